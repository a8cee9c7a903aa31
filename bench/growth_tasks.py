"""The tasks of the growth measure, each in three splits that share no example: train, control, sealed.

    task      inputs                    targets         train     control   sealed   source
    digits    8x8 pixels, 0 to 1        10 digits       1,037     260       500      ships with scikit-learn
    mnist1d   signals of 40 samples     10 digits       3,200     800       1,000    generated (arXiv:2011.14439)
    chars     16 characters             the next one   259,984    2,048     4,096   text that ships with Python

Decisions see the control split; the sealed one is read once per arm, at its end. The splits are the same for every
seed. No example stands in two splits, by its bytes. Text is cut into three blocks; Python's help quotes whole topics
within others, so each paragraph is taken once, and contexts that stand anywhere in an earlier block are left out.
An epoch of text is 12,288 examples, not a whole pass: few passes over much text are how language models are trained,
and a net that has learnt its text by heart shows nothing about growing.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from esper.contracts.errors import InvalidInputError, UnavailableError

TaskName = Literal["digits", "mnist1d", "chars"]
TASKS: Final[tuple[TaskName, ...]] = ("digits", "mnist1d", "chars")

CONTEXT: Final = 16
"""Characters that the language model sees."""
VOCABULARY: Final = "\0\n !\"#%&'()*+,-./0123456789:;<=>?[\\]_`abcdefghijklmnopqrstuvwxyz{|}"
"""Characters told apart, after lowering; the first stands for all others."""
REFERENCE_TEXT_SHA256: Final = "ed117637487c1ec83fc3c407cd8d28ed20174eedb06c56a0d1c1e1376859caac"
"""Digest of the text with the Python on which figures were first taken; another patch version may have another text."""

_CONTROL_SHARE: Final = 0.2
_TEXT_LENGTH: Final = 370_000
_CHAR_BLOCKS: Final = ((0, 260_000, 260_000), (260_000, 300_000, 2_048), (300_000, 370_000, 4_096))
"""First and last character of each split's block of text, and the most examples drawn from it."""
_CHAR_EPOCH: Final = 12_288


@dataclass(frozen=True, eq=False, slots=True)
class Examples:
    """Some examples; the first dimension of both counts them."""

    inputs: Tensor
    """What the network is given."""
    targets: Tensor
    """Class of each, int64."""

    def __len__(self) -> int:
        return len(self.targets)

    def __add__(self, other: Examples) -> Examples:
        return Examples(torch.cat([self.inputs, other.inputs]), torch.cat([self.targets, other.targets]))

    def digests(self) -> list[str]:
        """Give the SHA-256 of each example's inputs."""
        return [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in self.inputs]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Task:
    """A task in three splits."""

    name: TaskName
    """Its name."""
    train: Examples
    """What is learnt from."""
    control: Examples
    """What decisions and choices see."""
    sealed: Examples
    """Read once, at the end of an arm."""
    num_classes: int
    """Classes of the targets."""
    is_language: bool = False
    """Whether arms are told apart by loss (bits per character) rather than by accuracy."""
    note: str = ""
    """What a reader must know of the data."""
    passes_per_epoch: float = 1.0
    """Share of the examples that one epoch takes, at most 1."""

    @property
    def epoch_of_train(self) -> Examples:
        """As many training examples as an epoch has, always the same ones."""
        return _cut(self.train, _epoch_length(self.train, self.passes_per_epoch))[0]


class Batches:
    """Training batches in an order that depends on the seed alone; every pass goes on with the next permutation.

    An epoch takes the next ``passes_per_epoch`` of the permutation; what is too little for an epoch is left out.
    """

    def __init__(self, examples: Examples, *, batch_size: int, seed: int, passes_per_epoch: float = 1.0) -> None:
        self._examples, self._batch_size = examples, batch_size
        self._epoch_length = _epoch_length(examples, passes_per_epoch)
        self._generator = torch.Generator().manual_seed(seed)
        self._left = torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if len(self._left) < self._epoch_length:
            self._left = torch.randperm(len(self._examples), generator=self._generator)
        epoch, self._left = self._left[: self._epoch_length], self._left[self._epoch_length :]
        for part in torch.split(epoch, self._batch_size):
            yield self._examples.inputs[part], self._examples.targets[part]


def _epoch_length(examples: Examples, passes_per_epoch: float) -> int:
    return round(passes_per_epoch * len(examples))


@cache
def load(name: str) -> Task:
    """Give a task; nothing is downloaded.

    Raises:
        InvalidInputError: There is no such task.
        UnavailableError: The package that the data comes with is not installed.
    """
    loaders = {"digits": _load_digits, "mnist1d": _load_mnist1d, "chars": _load_chars}
    if name not in loaders:
        raise InvalidInputError.of("task", f"be one of {', '.join(loaders)}", name)
    return loaders[name]()


def _load_digits() -> Task:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UnavailableError("task digits needs scikit-learn: pip install 'esper[demo]'") from error
    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32) / 16.0
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    everything = Examples(pixels[order], torch.tensor(data.target, dtype=torch.long)[order])
    pool, sealed = _cut(everything, len(everything) - 500)
    train, control = _cut(pool, len(pool) - math.ceil(_CONTROL_SHARE * len(pool)))
    return Task(name="digits", train=train, control=control, sealed=sealed, num_classes=10)


def _load_mnist1d() -> Task:
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise UnavailableError("task mnist1d needs mnist1d: pip install 'esper[bench]'") from error
    # The generator seeds numpy and random for the whole process.
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - the global one is meant
    data = make_dataset(get_dataset_args())
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate(python_state)
    pool = Examples(torch.tensor(data["x"], dtype=torch.float32), torch.tensor(data["y"], dtype=torch.long))
    sealed = Examples(torch.tensor(data["x_test"], dtype=torch.float32), torch.tensor(data["y_test"], dtype=torch.long))
    train, control = _cut(pool, len(pool) - math.ceil(_CONTROL_SHARE * len(pool)))
    return Task(name="mnist1d", train=train, control=control, sealed=sealed, num_classes=10)


def _load_chars() -> Task:
    text = shipped_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    places = {character: index for index, character in enumerate(VOCABULARY)}
    codes = bytes(places.get(character, 0) for character in text.lower())
    generator, seen = torch.Generator().manual_seed(0), set[bytes]()
    splits: list[Examples] = []
    for first, last, count in _CHAR_BLOCKS:
        block = codes[first:last]
        splits.append(_draw_contexts(block, count, generator, seen))
        seen.update(_contexts(block))
    known = (
        "the reference's" if digest == REFERENCE_TEXT_SHA256 else "NOT the reference's: another Python patch version"
    )
    note = f"chars: SHA-256 of the text {digest[:16]}..., {known}."
    train, control, sealed = splits
    return Task(
        name="chars",
        train=train,
        control=control,
        sealed=sealed,
        num_classes=len(VOCABULARY),
        is_language=True,
        note=note,
        passes_per_epoch=_CHAR_EPOCH / len(train),
    )


def shipped_text() -> str:
    """Give Python's own help topics in the order of their names, each paragraph once, cut to a length.

    A paragraph is the same where it differs in case, blanks and line ends alone.
    """
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.lower().split()), paragraph)
    return "\n\n".join(paragraphs.values())[:_TEXT_LENGTH]


def _contexts(block: bytes) -> Iterator[bytes]:
    """Give every context of a block that something follows, place by place."""
    return (block[place : place + CONTEXT] for place in range(len(block) - CONTEXT))


def _draw_contexts(block: bytes, count: int, generator: torch.Generator, seen: set[bytes]) -> Examples:
    """Draw contexts at random places of a block, leaving out those that ``seen`` holds."""
    fresh = [place for place, context in enumerate(_contexts(block)) if context not in seen]
    drawn = torch.randperm(len(fresh), generator=generator)[:count]
    codes = torch.frombuffer(bytearray(block), dtype=torch.uint8).long()
    windows = codes.unfold(0, CONTEXT + 1, 1)[torch.tensor(fresh)[drawn]]
    return Examples(windows[:, :-1].contiguous(), windows[:, -1].contiguous())


def _cut(examples: Examples, place: int) -> tuple[Examples, Examples]:
    """Give the examples before a place, and those from there on."""
    return (
        Examples(examples.inputs[:place], examples.targets[:place]),
        Examples(examples.inputs[place:], examples.targets[place:]),
    )
