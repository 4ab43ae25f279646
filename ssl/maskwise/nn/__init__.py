"""Modules with weights: backbones, poolings, encoder, projection head, classifiers."""

from maskwise.nn.backbones.base import BackboneBase
from maskwise.nn.backbones.factory import Backbone
from maskwise.nn.backbones.feature_maps import FeatureMapBackbone
from maskwise.nn.backbones.transformer import TransformerBackbone
from maskwise.nn.classifiers import CLASSIFIERS, LinearClassifier
from maskwise.nn.encoder import Encoder, encoder_from_spec
from maskwise.nn.heads import ProjectionHead
from maskwise.nn.multi_token.neck import MAPNeck
from maskwise.nn.pooling import CLS, POOLINGS, SimPool
from maskwise.nn.tokens import Features, Pooled, Tokens

# by the timm file that holds a family's models
BACKBONES = {
    "vision_transformer": TransformerBackbone,
    "eva": TransformerBackbone,
    "resnet": FeatureMapBackbone,
    "convnext": FeatureMapBackbone,
    "swin_transformer": FeatureMapBackbone,
    "swin_transformer_v2": FeatureMapBackbone,
    "maxxvit": FeatureMapBackbone,
    "pit": FeatureMapBackbone,
    "efficientnet": FeatureMapBackbone,
    "mlp_mixer": FeatureMapBackbone,
}

__all__ = [
    "BACKBONES",
    "CLASSIFIERS",
    "CLS",
    "POOLINGS",
    "Backbone",
    "BackboneBase",
    "Encoder",
    "Features",
    "LinearClassifier",
    "MAPNeck",
    "Pooled",
    "ProjectionHead",
    "SimPool",
    "Tokens",
    "encoder_from_spec",
]
