"""The transports that weights can take, one file for each."""

from spell_megatron.rollout.transports.gloo import GLOO
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.rollout.transports.nccl import NCCL

TRANSPORTS = {transport.name: transport for transport in (GLOO, NCCL, IPC)}
