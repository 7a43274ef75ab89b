"""Models as files for other engines: ONNX and `torch.export` programs, each compared with its model when written."""
