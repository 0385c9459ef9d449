"""Whole models, made of `nn` layers."""

from deepseek_jax.models.classifier import Classifier as Classifier
from deepseek_jax.models.parts import ConvolutionalInput as ConvolutionalInput
from deepseek_jax.models.parts import RecurrentAttention as RecurrentAttention
