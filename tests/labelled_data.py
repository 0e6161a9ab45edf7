"""Small labelled data: a folder or shards per class."""

from pathlib import Path

from conftest import picture, write_tar

NAMES = ["ant", "bee", "cow", "dog", "elk", "fox"]
CLASSES = ["red panda", *NAMES[:3]]


def class_folders(root: Path, each: int = 3, shift: int = 0) -> Path:
    for number, name in enumerate(["ant", "bee", "cow", "red_panda"]):
        (root / name).mkdir(parents=True)
        for copy in range(each):
            (root / name / f"{copy}.png").write_bytes(picture(60 * number + 7 * copy + shift))
    return root


def class_shards(root: Path, labels: list[bytes]) -> Path:
    members = []
    for number, label in enumerate(labels):
        members += [(f"{number:03d}.png", picture(9 * number)), (f"{number:03d}.cls", label)]
    write_tar(root / "part-0.tar", members)
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    return root
