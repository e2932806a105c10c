"""Checksums by which both ends of a weight transfer compare tensors."""

from __future__ import annotations

import torch

_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed 64-bit integer


def checksum(tensor: torch.Tensor) -> str:
    """Dtype, shape and a 64-bit checksum of a tensor's bits, the same on every device.

    The checksum is the sum over i of word_i * (2 i + 1) * c mod 2^64, with the bits read as 32-bit words (bytes,
    where they are not a multiple of 32 bits): it changes when words change or change places.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 4:
        flat = flat.clone()  # words have to lie at multiples of their size
    words = flat.view(torch.int32) if len(flat) % 4 == 0 else flat
    # Fits a CPU's cache; on other devices the number of calls counts.
    length = 1 << 16 if words.device.type == "cpu" else 1 << 24
    factors = (2 * torch.arange(min(length, len(words)), device=words.device) + 1) * _MULTIPLIER
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), length):
        chunk = words[start : start + length].to(torch.int64)
        # The factors of this chunk are those of the first one, moved by 2 * start * c (as a signed integer).
        moved = (2 * start * _MULTIPLIER + (1 << 63)) % (1 << 64) - (1 << 63)
        total += (chunk * factors[: len(chunk)]).sum() + chunk.sum() * moved
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]:{int(total) % (1 << 64):016x}"
