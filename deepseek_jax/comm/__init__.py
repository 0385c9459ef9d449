"""Gradient exchange: send less, send later, lose nothing."""

from deepseek_jax.comm.adapt import adapt as adapt
from deepseek_jax.comm.asynchronous import asynchronous as asynchronous
from deepseek_jax.comm.delayed import delayed as delayed
from deepseek_jax.comm.diloco import diloco as diloco
from deepseek_jax.comm.plain import PlainState as PlainState
from deepseek_jax.comm.plain import float_all_reduce as float_all_reduce
from deepseek_jax.comm.power_sgd import power_sgd as power_sgd
from deepseek_jax.comm.quantized import bf16_all_reduce as bf16_all_reduce
from deepseek_jax.comm.quantized import int_all_reduce as int_all_reduce
from deepseek_jax.comm.quantized import one_bit as one_bit
from deepseek_jax.comm.quantized import top_k as top_k
from deepseek_jax.comm.state import ExchangeState as ExchangeState
from deepseek_jax.comm.state import PerDevice as PerDevice
from deepseek_jax.comm.state import init as init
from deepseek_jax.comm.state import state_specs as state_specs
from deepseek_jax.comm.workers import local_params as local_params
from deepseek_jax.parallel import wire_bytes as wire_bytes
