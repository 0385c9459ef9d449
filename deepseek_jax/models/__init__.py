"""Whole models, made of `nn` layers."""

from deepseek_jax.models.classifier import Classifier as Classifier
from deepseek_jax.models.cost import token_flops as token_flops
from deepseek_jax.models.generation import generate as generate
from deepseek_jax.models.generation import sample as sample
from deepseek_jax.models.generation import stream as stream
from deepseek_jax.models.language import DecoderLayer as DecoderLayer
from deepseek_jax.models.language import LanguageModel as LanguageModel
from deepseek_jax.models.parts import ConvolutionalInput as ConvolutionalInput
from deepseek_jax.models.parts import RecurrentAttention as RecurrentAttention
