"""The contents and metadata of the package."""

import configparser

import yaml
from conftest import ROOT

import clipx

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def test_one_version_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert clipx.__version__ == SETUP["metadata"]["version"] == cited["version"] and "__version__" in dir(clipx)
    assert f"\n## {clipx.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_names_what_clipx_builds_on() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} < cited.keys()
    assert cited["authors"] == [{"name": "the clipx authors"}]
    assert all(
        work["title"] and work["authors"] and work["type"] in ("article", "software") for work in cited["references"]
    )
    sources = [work.get("identifiers", [{"value": work.get("doi")}])[0]["value"] for work in cited["references"]]
    assert {"arXiv:2103.00020", "arXiv:2212.07143", "arXiv:2101.06983", "arXiv:2210.02885"} < set(sources)


def test_every_package_and_every_file_that_is_no_code_is_shipped() -> None:
    packages, data = SETUP["options"]["packages"].split(), SETUP["options.package_data"]
    for name, folder in (("clipx", ROOT / "clipx"), ("clipx.conf", ROOT / "conf")):
        for init in folder.rglob("__init__.py"):
            package = ".".join([name, *init.parent.relative_to(folder).parts])
            assert package in packages
            if any(init.parent.glob("*.yaml")):
                assert data[package] == "*.yaml"
    assert data["clipx"] == "py.typed" and (ROOT / "clipx/py.typed").exists()
