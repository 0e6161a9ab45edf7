"""WebDataset tars: their headers, and the index of where each sample is."""
