"""Files in, batches out: datasets, decoding, crops, augmentation and the loader; imports nothing of models."""
