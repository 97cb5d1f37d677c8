"""From a position of the one sequence to what DALI is fed for the batch there: encoded images and our numbers.

Separate because it runs in the reading threads and knows nothing of DALI's pipelines. Order, labels, headers, random
numbers and substitutes are those of the default reader, made by the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaclass.data.bad_samples import BadSample
from megaclass.data.batch import Batch
from megaclass.data.changes import draw_changes
from megaclass.data.dali_pipeline import Feeds, Form, as_netpbm, resize_feeds, warp_matrices
from megaclass.data.decode import Header, decode_pixels, judge_header, judge_jpeg_data
from megaclass.data.label_noise import NoisyLabels
from megaclass.data.members import SampleMembers
from megaclass.data.options import ReaderOptions
from megaclass.data.order import rank_positions
from megaclass.data.ordered import OrderedBatches
from megaclass.data.samples import StoredSamples


@dataclass(frozen=True)
class DaliInput:
    """One batch before it is decoded: from `position` to `end`, and in which `form` it must go through DALI."""

    position: int
    end: int
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    form: Form
    feeds: Feeds


@dataclass(frozen=True)
class InputMaker:
    """Position → `DaliInput` of one rank, for use in one thread at a time.

    Attributes:
        samples: where encoded images and labels come from.
        ordered: the default reader's maker of batches, over the same samples.
        is_on_gpu: whether a GPU decodes.
    """

    samples: StoredSamples
    ordered: OrderedBatches
    is_on_gpu: bool

    @property
    def _options(self) -> ReaderOptions:
        return self.ordered.options

    def make(self, position: int) -> DaliInput | Batch:
        """This rank's part of the micro-batch that starts at `position`.

        Where a sample is bad, the default reader makes the batch: it finds all the bad ones of it, and substitutes.

        Raises:
            DataError: as `OrderedBatches.make`.
        """
        try:
            return self._make(position, is_decoding=False)
        except BadSample:
            return self.ordered.make(position)

    def make_decoded(self, position: int) -> DaliInput:
        """The same of a batch without bad samples, with every image decoded by the default reader's decoders."""
        return self._make(position, is_decoding=True)

    def _make(self, position: int, *, is_decoding: bool) -> DaliInput:
        ordered, options = self.ordered, self._options
        positions = rank_positions(position, options.batch_size, options.rank, options.world_size)
        ids, visits = ordered.order.visits(positions)
        labels = np.zeros(len(ids), np.int64)
        headers, images = [], []
        for place, sample_id in enumerate(ids.tolist()):
            members, labels[place], _ = self.samples.encoded(sample_id)
            header = judge_header(members.image, members.extension)
            headers.append(header)
            is_ours = is_decoding or self._differs(header)
            if members.extension == "jpg" and not is_ours:
                judge_jpeg_data(members.image)
            images.append(self._image(members, is_ours))
        if isinstance(ordered.samples, NoisyLabels):
            labels = ordered.samples.noisy(ids, labels)
        form, feeds = self._form(headers), self._numbers(ids, visits)
        feeds["encoded"] = images
        if form.resizes:
            sides = [header.height for header in headers], [header.width for header in headers]
            feeds.update(resize_feeds(*sides, options.image_size))
        end = position + options.micro_batch_size
        return DaliInput(position, end, ids, labels, form, feeds)

    def _differs(self, header: Header) -> bool:
        """Whether DALI might see other pixels in an image than the default reader.

        On a CPU it smooths colour between the pixels of a subsampled JPEG and has no way to leave that out: at the
        edge of two colours that makes a hundred grey levels.
        """
        return not header.is_plain or (header.is_subsampled and self._options.channels == 3 and not self.is_on_gpu)

    def _image(self, members: SampleMembers, is_ours: bool) -> NDArray[np.uint8]:
        """The bytes of an image file: the stored one, or one of the pixels that the default reader sees in it."""
        if is_ours:
            return as_netpbm(decode_pixels(members.image, members.extension, self._options.channels))
        return np.frombuffer(members.image, np.uint8)

    def _form(self, headers: list[Header]) -> Form:
        options, augment = self._options, self._options.augment
        return Form(
            batch_size=options.batch_size,
            image_size=options.image_size,
            channels=options.channels,
            flips=augment.flip > 0,
            warps=bool(augment.shift or augment.scale or augment.rotation or augment.shear or augment.crop),
            erases=augment.erase > 0,
            resizes=any((header.height, header.width) != (options.image_size,) * 2 for header in headers),
        )

    def _numbers(self, ids: NDArray[np.int64], visits: NDArray[np.int64]) -> Feeds:
        form, options = self._form([]), self._options
        changes = draw_changes(ids, visits, options.seed, options.augment, options.image_size)
        feeds: Feeds = {}
        if form.warps:
            feeds["matrix"] = warp_matrices(changes.resampling, changes.is_mirrored, options.image_size)
        elif form.flips:
            feeds["mirrored"] = changes.is_mirrored.astype(np.int32)
        if form.erases:
            rectangles = changes.erased.astype(np.float32)
            feeds["erased_start"], feeds["erased_shape"] = rectangles[:, :2].copy(), rectangles[:, 2:].copy()
        return feeds
