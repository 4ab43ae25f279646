"""Backbone families: one adapter per timm model class."""
