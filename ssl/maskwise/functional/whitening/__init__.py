"""PCA whitening of features, and of patches for a first layer."""
