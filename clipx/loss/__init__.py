"""Losses of pairs."""

from clipx.loss.contrastive import clip_loss
from clipx.loss.distill import distill_loss
from clipx.loss.sigmoid import sigmoid_loss

__all__ = ["clip_loss", "distill_loss", "sigmoid_loss"]
