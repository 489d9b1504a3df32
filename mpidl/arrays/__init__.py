"""One view of numpy arrays, torch tensors and cupy arrays; layouts of many tensors in one buffer; packing; devices."""
