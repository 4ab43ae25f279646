"""Modules with weights: backbone, poolings, encoder, projection head."""

from maskwise.nn.backbone import Backbone
from maskwise.nn.classifiers import CLASSIFIERS, LinearClassifier
from maskwise.nn.encoder import Encoder, encoder_from_spec
from maskwise.nn.heads import ProjectionHead
from maskwise.nn.maps import MapBackbone
from maskwise.nn.pooling import CLS, POOLINGS, SimPool
from maskwise.nn.tokens import Features, Pooled, Tokens
from maskwise.nn.transformer import TransformerBackbone

# by the file of timm that holds a family's models
BACKBONES = {
    "vision_transformer": TransformerBackbone, "eva": TransformerBackbone, "resnet": MapBackbone, "convnext": MapBackbone, "swin_transformer": MapBackbone,
    "swin_transformer_v2": MapBackbone, "maxxvit": MapBackbone, "pit": MapBackbone, "efficientnet": MapBackbone, "mlp_mixer": MapBackbone,
}  # fmt: skip

__all__ = ["BACKBONES", "CLASSIFIERS", "CLS", "POOLINGS", "Backbone", "Encoder", "Features", "LinearClassifier", "Pooled", "ProjectionHead", "SimPool", "Tokens", "encoder_from_spec"]
