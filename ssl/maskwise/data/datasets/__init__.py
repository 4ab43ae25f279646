"""Datasets: indexable collections of images with optional labels; DATASETS is the table of their kinds."""

from maskwise.data.datasets.folder import Folder
from maskwise.data.datasets.huggingface import HuggingFace
from maskwise.data.datasets.list_file import ImageList
from maskwise.data.datasets.shapes import Shapes
from maskwise.data.datasets.tar import Tar
from maskwise.data.datasets.torch_dataset import TorchDataset
from maskwise.data.datasets.torchvision_sets import TorchvisionSet

DATASETS = {
    "folder": Folder,
    "list": ImageList,
    "tar": Tar,
    "torchvision": TorchvisionSet,
    "huggingface": HuggingFace,
    "shapes": Shapes,
    "python": TorchDataset,
}

__all__ = ["DATASETS", "Folder", "HuggingFace", "ImageList", "Shapes", "Tar", "TorchDataset", "TorchvisionSet"]
