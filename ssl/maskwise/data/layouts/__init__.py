"""Datasets as users have them on disk: each module has `holds(folder)`, a glance, and `read(folder, ...)`, checked up front."""

from maskwise.data.layouts import (
    ade, cars, cifar, coco, copydays, cub, davis, flowers, imagenet, in9, inshop, products, revisited, voc, wsol,
)  # fmt: skip

LAYOUTS = {
    "imagenet": imagenet, "in9": in9, "revisited": revisited, "copydays": copydays, "cub": cub, "cars": cars, "products": products,
    "inshop": inshop, "flowers": flowers, "cifar": cifar, "voc": voc, "coco": coco, "wsol": wsol, "davis": davis, "ade": ade,
}  # fmt: skip
