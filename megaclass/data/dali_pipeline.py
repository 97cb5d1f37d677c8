"""One DALI pipeline: encoded images and numbers in, normalised float32 batches out, on a CPU or a GPU.

Separate because it is the only file that knows DALI. It draws nothing and decides nothing: what happens to an image is
in the numbers fed with it, so the same numbers give the same batch as `transforms.transform`, within rounding.

Resizing: `fn.resize` repeats the border pixel outside the image where Pillow leaves it out, up to 17 grey levels of
difference at the rim. So images are put on a black ground first and the result is divided by the share of the filter
that lay inside, a number for each row and each column.

Processes: DALI's threads live in the trainer's process, and nothing is forked.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from megaclass.errors import ConfigError

BATCHES_AHEAD = 2
"""Batches that may be fed before one is taken."""

Feeds = dict[str, Any]
"""What is fed for a batch, by the name of the input: an array, or a list of arrays."""


@dataclass(frozen=True)
class Form:
    """What a pipeline does to every batch.

    Attributes:
        batch_size: largest number of images in a batch.
        image_size: pixels a side of the result.
        channels: 1 for luminance, 3 for RGB.
        flips, warps, erases: which changes it makes; a flip of an image that is also warped is part of its matrix.
        resizes: whether images may have another size before.
    """

    batch_size: int
    image_size: int
    channels: int
    flips: bool
    warps: bool
    erases: bool
    resizes: bool


class DaliPipeline:
    """A built and tried pipeline. Batches come out in the order in which they were fed.

    Args:
        form: what it does.
        device: where the results lie. On a CUDA device JPEG files are decoded by it (`mixed`), too.
        num_threads: that decode.

    Raises:
        ConfigError: DALI is not installed, or cannot run on the device.
    """

    def __init__(self, form: Form, device: torch.device, num_threads: int) -> None:
        self._device = device
        self._num_fed = 0
        self._error: RuntimeError | None = None
        check_installed()
        try:
            self._pipe: Any = _build(form, device, num_threads)
            # The first run of a pipeline starts as many as it may hold. It gets blanks, which also show that it works.
            for _ in range(BATCHES_AHEAD):
                self._feed(_blank(form))
            self._pipe.schedule_run()
            self._num_fed = BATCHES_AHEAD
            for _ in range(BATCHES_AHEAD):
                self.take()
        except RuntimeError as error:
            raise ConfigError(
                f"DALI cannot run on {device}: {' '.join(str(error).split())[-300:]}; use dataset.reader: indexed"
            ) from error

    def feed(self, feeds: Feeds) -> None:
        """Start a batch; at most `BATCHES_AHEAD` may be under way. Errors are raised by the `take` of the batch."""
        if self._error is None:
            try:
                self._feed(feeds)
                self._pipe.schedule_run()
                self._num_fed += 1
            # An earlier batch may have broken the pipeline, and its turn comes first.
            except RuntimeError as error:
                self._error = error

    def take(self) -> Tensor:
        """The next batch, [batch, channels, image_size, image_size] float32 in [-1, 1], on the device.

        On a CUDA device the work is ordered on torch's current stream and nothing waits for it.

        Raises:
            RuntimeError: DALI rejects a sample of the batch, or failed. The pipeline is of no more use.
        """
        if not self._num_fed:
            assert self._error is not None, "nothing was fed"
            raise self._error
        self._num_fed -= 1
        images, _ = take_batch(self._pipe, self._device)
        return images

    def close(self) -> None:
        """End the threads and free the memory."""
        self._pipe = None

    def _feed(self, feeds: Feeds) -> None:
        for name, data in feeds.items():
            self._pipe.feed_input(name, data)


def take_batch(pipe: Any, device: torch.device) -> tuple[Tensor, list[list[NDArray[Any]]]]:
    """The next outputs of a pipeline: images, normalised as `DaliPipeline.take` says, and copies of all others.

    Raises:
        RuntimeError: DALI failed. The pipeline is of no more use.
    """
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else nullcontext():
        output, *others = pipe.share_outputs(torch.cuda.current_stream() if on_gpu else None)
        pixels = from_dlpack(output.as_tensor())
        # As `transforms.normalise`. On a CPU the batch may stay in DALI's memory, which lives as long as it. On a
        # GPU it gets memory of torch's, and DALI's goes back in the order of this stream.
        is_own = pixels.dtype == torch.float32 and not on_gpu
        images = (pixels.div_(127.5) if is_own else torch.div(pixels, 127.5)).sub_(1.0)
        copies = [[np.array(other.at(place)) for place in range(len(other))] for other in others]
        del pixels, output, others
        pipe.release_outputs()
    return images, copies


def check_installed() -> None:
    """`ConfigError` that names the extra, where DALI is not installed."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"dataset.reader dali needs NVIDIA DALI ({error}); install it with: pip install 'megaclass[dali]', or use "
            "dataset.reader: indexed"
        ) from error


def as_netpbm(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels [height, width] or [height, width, 3] as a file that DALI decodes to the same pixels."""
    height, width = pixels.shape[:2]
    kind = b"P5" if pixels.ndim == 2 else b"P6"
    return np.frombuffer(b"%s\n%d %d\n255\n" % (kind, width, height) + pixels.tobytes(), np.uint8)


def warp_matrices(rows: NDArray[np.float32], mirrored: NDArray[np.bool_], size: int) -> NDArray[np.float32]:
    """[batch, 2, 3]: `Changes.resampling` in pixels from the corner, with the flip before it folded in."""
    result = rows.astype(np.float64)
    result[:, :, 2] = size / 2 * (1 - result[:, :, 0] - result[:, :, 1] + result[:, :, 2])
    result[mirrored, 0] *= -1
    result[mirrored, 0, 2] += size
    return result.astype(np.float32)


def resize_feeds(heights: list[int], widths: list[int], size: int) -> Feeds:
    """What a pipeline that resizes needs to know of each image: the ground it is put on, and the gains."""
    tall, wide = ([filter_gain(length, size) for length in lengths] for lengths in (heights, widths))
    margins = np.array([(above, left) for (above, _), (left, _) in zip(tall, wide, strict=True)])
    sides = np.array([heights, widths]).T
    return {
        "ground_start": (-margins).astype(np.int32),
        "ground_shape": (sides + 2 * margins).astype(np.int32),
        "image_start": margins.astype(np.float32),
        "image_end": (margins + sides).astype(np.float32),
        "row_gain": np.stack([gain for _, gain in tall]).reshape(-1, size, 1, 1),
        "column_gain": np.stack([gain for _, gain in wide]).reshape(-1, 1, size, 1),
    }


@lru_cache(maxsize=4096)
def filter_gain(length: int, size: int) -> tuple[int, NDArray[np.float32]]:
    """For a side of `length` pixels resized to `size`: how far the filter reaches, and by what to multiply.

    The filter is a triangle, as wide as two pixels of the coarser side. Where a part of it lies outside the image, the
    sum of what lies inside is too small by the inverse of the gain [size].
    """
    scale = length / size
    reach = max(1.0, scale)
    margin = math.ceil(reach) + 1
    centres = (np.arange(size) + 0.5) * scale
    places = np.arange(-margin, length + margin) + 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(places - centres[:, None]) / reach)
    inside = weights[:, margin : margin + length].sum(1)
    return margin, (weights.sum(1) / inside).astype(np.float32)


def _blank(form: Form) -> Feeds:
    """A batch of one black image of the right size that nothing is done to."""
    size = form.image_size
    shape = (size, size) if form.channels == 1 else (size, size, 3)
    feeds: Feeds = {"encoded": [as_netpbm(np.zeros(shape, np.uint8))]}
    if form.resizes:
        feeds.update(resize_feeds([size], [size], size))
    if form.warps:
        feeds["matrix"] = np.eye(2, 3, dtype=np.float32)[None]
    elif form.flips:
        feeds["mirrored"] = np.zeros(1, np.int32)
    if form.erases:
        feeds["erased_start"] = feeds["erased_shape"] = np.zeros((1, 2), np.float32)
    return feeds


def new_pipeline(batch_size: int, num_threads: int, device: torch.device) -> Any:
    """An empty pipeline of DALI's for batches of at most so many images."""
    from nvidia.dali import Pipeline

    on_gpu = device.type == "cuda"
    return Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=(torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None,
        prefetch_queue_depth=BATCHES_AHEAD,
        set_affinity=False,
    )


def decode(encoded: Any, channels: int, device: torch.device) -> Any:
    """The node of a pipeline that decodes image files, on a GPU where the device is one."""
    from nvidia.dali import fn, types

    # Several ranks share the cores of a machine, so none ties its threads to some.
    placed: Any = {"device": "mixed", "affine": False} if device.type == "cuda" else {"device": "cpu"}
    return fn.decoders.image(
        encoded,
        output_type=types.GRAY if channels == 1 else types.RGB,
        # As the decoders of the other readers: no turning by EXIF, the fast transform, colour not smoothed (GPU).
        adjust_orientation=False,
        use_fast_idct=True,
        jpeg_fancy_upsampling=False,
        **placed,
    )


def _build(form: Form, device: torch.device, num_threads: int) -> Any:
    from nvidia.dali import fn, types

    on_gpu = device.type == "cuda"
    size = form.image_size

    def number(name: str, ndim: int, dtype: Any = types.FLOAT) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    pipe = new_pipeline(form.batch_size, num_threads, device)
    with pipe:
        images = decode(number("encoded", 1, types.UINT8), form.channels, device)
        if form.resizes:
            images = fn.slice(
                images, start=number("ground_start", 1, types.INT32), shape=number("ground_shape", 1, types.INT32),
                axis_names="HW", out_of_bounds_policy="pad", fill_values=0,
            )  # fmt: skip
            images = fn.resize(
                images, size=[size, size], roi_start=number("image_start", 1), roi_end=number("image_end", 1),
                interp_type=types.INTERP_TRIANGULAR, antialias=True, dtype=types.FLOAT,
            )  # fmt: skip
            gains = [number("row_gain", 3), number("column_gain", 3)]
            for gain in gains:
                images = images * (gain.gpu() if on_gpu else gain)
            images = fn.cast(images, dtype=types.UINT8)
        if form.warps:
            # Without a fill value, the border is repeated.
            images = fn.warp_affine(images, matrix=number("matrix", 2), size=(size, size), dtype=types.FLOAT)
        planes = fn.crop_mirror_normalize(
            images,
            mirror=number("mirrored", 0, types.INT32) if form.flips and not form.warps else 0,
            mean=[0.0],
            std=[1.0],
            dtype=types.FLOAT if form.warps or form.erases else types.UINT8,
            output_layout="CHW",
        )
        if form.erases:
            planes = fn.erase(
                planes, anchor=number("erased_start", 1), shape=number("erased_shape", 1), axis_names="HW",
                fill_value=127.5,
            )  # fmt: skip
        pipe.set_outputs(planes)
    pipe.build()
    return pipe
