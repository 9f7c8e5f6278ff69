"""Seeded inputs that look like what a model sees in use: padded sentences, smooth images, speech-like sound.

Every function returns arrays by input name and takes the generator first, so that one seed fixes a whole batch.
"""

from __future__ import annotations

import functools

import numpy as np

Inputs = dict[str, np.ndarray]

SAMPLE_RATE = 16_000
_IMAGE_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGE_STD = np.array([0.229, 0.224, 0.225], np.float32)


def text(
    rng: np.random.Generator,
    batch: int,
    tokens: int,
    *,
    vocab: int,
    mask: bool = False,
    end: int | None = None,
    pad: int = 0,
) -> Inputs:
    """Sentences of differing length, padded at the end.

    Token frequencies fall off as in natural text (Zipf's law); ``end`` closes every sentence when given.

    Args:
        rng: Source of randomness.
        batch: Number of sentences.
        tokens: Padded length.
        vocab: Size of the embedding table; ids lie in ``[1, vocab)`` before the padding.
        mask: Also return ``attention_mask``.
        end: Id of the end-of-sentence token.
        pad: Id that fills up each sentence.

    Returns:
        ``input_ids`` int64 ``[batch, tokens]`` and, when asked for, ``attention_mask`` of the same type and shape.
    """
    rank = np.minimum(rng.zipf(1.2, (batch, tokens)), vocab - 1)
    ids = (rank * 7919) % (vocab - 1) + 1
    lengths = rng.integers((tokens + 1) // 2, max(tokens, 2), batch).clip(1, tokens)
    position = np.arange(tokens)
    valid = position < lengths[:, None]
    if end is not None:
        ids = np.where(ids == end, 1, ids)
        ids = np.where(position == lengths[:, None] - 1, end, ids)
    arrays = {"input_ids": np.where(valid, ids, pad).astype(np.int64)}
    return arrays | ({"attention_mask": valid.astype(np.int64)} if mask else {})


def image(rng: np.random.Generator, batch: int, size: int, name: str = "pixel_values") -> Inputs:
    """Smooth colour images, normalized by ImageNet's mean and deviation.

    Returns:
        ``name``: float32 ``[batch, 3, size, size]``, about -2.1 to 2.6.
    """
    return {name: _normalize(_picture(rng, (batch, 3), size))}


def video(rng: np.random.Generator, batch: int, clip: int, size: int, name: str = "video_frames") -> Inputs:
    """Clips in which a picture moves steadily under a little sensor noise.

    Returns:
        ``name``: float32 ``[batch, clip, 3, size, size]``.
    """
    still = _picture(rng, (batch, 3), size)
    step = rng.integers(1, 4, 2)
    moved = [np.roll(still, (t * step[0], t * step[1]), (-2, -1)) for t in range(clip)]
    frames = np.stack(moved, 1) + rng.normal(0, 0.01, (batch, clip, 3, size, size))
    return {name: _normalize(frames.clip(0, 1))}


def speech(rng: np.random.Generator, batch: int, frames: int, bins: int, name: str = "audio_features") -> Inputs:
    """Log-mel features of speech-like sound, one row every 10 ms.

    Returns:
        ``name``: float32 ``[batch, frames, bins]``, about -1 to 1.5.
    """
    sound = waveform(rng, batch, (frames - 1) * 160 + 400)
    return {name: log_mel(sound, bins)}


def waveform(rng: np.random.Generator, batch: int, samples: int) -> np.ndarray:
    """Speech-like sound at 16 kHz: gliding harmonics that come and go as syllables do, over quiet noise.

    Returns:
        float32 ``[batch, samples]`` in -1 to 1.
    """
    time = np.arange(samples) / SAMPLE_RATE
    pitch = rng.uniform(90, 250, (batch, 1)) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.5, 2, (batch, 1)) * time))
    phase = 2 * np.pi * np.cumsum(pitch, -1) / SAMPLE_RATE
    strength = rng.uniform(0.3, 1, (batch, 8, 1)) / np.arange(1, 9)[:, None]
    voice = sum(strength[:, k] * np.sin((k + 1) * phase) for k in range(8))
    syllables = np.clip(np.sin(2 * np.pi * rng.uniform(2, 5, (batch, 1)) * time + rng.uniform(0, 6, (batch, 1))), 0, 1)
    sound = 0.3 * voice * syllables + rng.normal(0, 0.005, (batch, samples))
    return np.asarray(sound.clip(-1, 1), np.float32)


def log_mel(sound: np.ndarray, bins: int) -> np.ndarray:
    """Log-mel spectrogram scaled as Whisper does it (25 ms windows, 10 ms steps, 80 dB range).

    Args:
        sound: float ``[batch, samples]`` at 16 kHz, at least 400 samples.
        bins: Number of mel bands.

    Returns:
        float32 ``[batch, 1 + (samples - 400) // 160, bins]``.
    """
    windows = np.lib.stride_tricks.sliding_window_view(sound, 400, -1)[:, ::160]
    power = np.abs(np.fft.rfft(windows * np.hanning(400), axis=-1)) ** 2
    level = np.log10(np.maximum(power @ _mel_filters(bins), 1e-10))
    peak = level.max((1, 2), keepdims=True)
    return np.asarray((np.maximum(level, peak - 8) + 4) / 4, np.float32)


@functools.cache
def _mel_filters(bins: int) -> np.ndarray:
    """Triangular filters, evenly spaced in mel: ``[201, bins]``."""
    mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), bins + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    hertz = np.linspace(0, SAMPLE_RATE / 2, 201)[:, None]
    rise, fall = (hertz - left) / (centre - left), (right - hertz) / (right - centre)
    return np.maximum(0, np.minimum(rise, fall))


def _picture(rng: np.random.Generator, lead: tuple[int, ...], size: int) -> np.ndarray:
    """Pixels in 0 to 1 whose detail fades with fineness, as in photographs: ``[*lead, size, size]``."""
    pixels = np.full((*lead, size, size), 0.5)
    for cells, weight in ((2, 0.3), (5, 0.15), (13, 0.08), (37, 0.04)):
        stretch = _interpolation(cells, size)
        pixels += weight * stretch @ rng.normal(0, 1, (*lead, cells, cells)) @ stretch.T
    return pixels.clip(0, 1)


def _interpolation(cells: int, size: int) -> np.ndarray:
    """Matrix ``[size, cells]`` that interpolates linearly from ``cells`` knots to ``size`` pixels."""
    at = np.linspace(0, cells - 1, size)[:, None]
    weights: np.ndarray = np.maximum(0, 1 - np.abs(at - np.arange(cells)))
    return weights


def _normalize(pixels: np.ndarray) -> np.ndarray:
    return np.asarray((pixels - _IMAGE_MEAN[:, None, None]) / _IMAGE_STD[:, None, None], np.float32)
