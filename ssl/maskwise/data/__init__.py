"""Files in, batches out: datasets, decoding, multi-crop, colour and the loader; knows nothing of models."""
