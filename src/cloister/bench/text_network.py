"""A stronger classifier of single texts, trained from scratch in minutes: three neural networks and a linear model vote.

Covers: a bidirectional GRU and a CNN (Kim 2014), both with the maximum over time; a deep averaging network (Iyyer et al.
2015) with the maximum beside the mean; `text_task`'s linear model with the weights of naive Bayes (Wang and Manning 2012).
Their probabilities are averaged. A word enters as two vectors: the public one as it is, with its rating in VADER's lexicon, and
one that begins as the public one and is tuned. So a word that the training text lacks still means something.
Does not cover: what a pre-trained language model reaches; nothing here has seen more text than the tasks and their vectors.

torch is imported with this module: import it when it is needed. Weights, order, dropout: all from one seed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor, nn
from torch.nn import functional

from cloister.bench import text_task as task

AVERAGING, CONVOLUTIONAL, RECURRENT = "averaging", "convolutional", "recurrent"
SORTS = (AVERAGING, CONVOLUTIONAL, RECURRENT)
HIDDEN = {AVERAGING: 200, CONVOLUTIONAL: 64, RECURRENT: 64}
"""Units in each direction, and maps of each width."""
WIDTHS = (1, 2, 3, 4)
EPOCHS = {AVERAGING: 5, CONVOLUTIONAL: 4, RECURRENT: 4}
BATCH = 256
RATE = 2e-3
"""Adam's first step size; it falls to 0 in a straight line."""
WORD_DROPOUT, INPUT_DROPOUT, DROPOUT = 0.1, 0.4, 0.5
LENGTH = 3.0
"""Mean length of word vectors."""
LONGEST = 96
"""Words of a text that are read."""
PADDING, UNKNOWN, RESERVED = 0, 1, 2


@dataclass(frozen=True)
class Voters:
    """A trained classifier."""

    networks: tuple["Network", ...]
    linear: Any
    weights: Any
    """By which the features of the linear model are multiplied."""
    features: task.Features

    def right(self, ids: task.Ids, source: task.Corpus) -> np.ndarray:
        """Returns whether each text is labelled right."""
        return self.probabilities(ids, source).argmax(axis=1) == source.labels

    def probabilities(self, ids: task.Ids, source: task.Corpus) -> Float64[np.ndarray, "examples labels"]:
        """Returns the mean over the voters."""
        texts = split_texts(ids, source)
        votes = [self.linear.predict_proba(self.features.of(ids, source) @ self.weights)]
        votes += [network.probabilities(texts) for network in self.networks]
        return np.mean(votes, axis=0)


def train(
    ids: task.Ids,
    source: task.Corpus,
    features: task.Features,
    ratings: Float32[np.ndarray, " words"],
    seed: int,
    kept: Path | None = None,
) -> Voters:
    """Returns voters trained on labelled texts.

    Args:
        ids: The words, by their place in the vocabulary; below 0 for words outside it.
        source: Which text each is of, and the labels, 0 and 1.
        features: What the linear model sees; its vectors are the public ones.
        ratings: A public rating of each word, 0 where there is none.
        seed: Of everything random.
        kept: Where the networks' weights are kept; those that are there already are taken, so the caller has to know that
            they are of the same training.
    """
    texts, labels = split_texts(ids, source), torch.from_numpy(source.labels)
    networks = []
    for place, sort in enumerate(SORTS):
        generator = torch.Generator().manual_seed(2 * seed + place)
        network = Network(sort, features.vectors, ratings, int(source.labels.max()) + 1, generator)
        file = kept / f".{sort}.npz" if kept else None
        if file and file.exists():
            with np.load(file, allow_pickle=False) as held:
                network.load_state_dict({name: torch.from_numpy(held[name]) for name in held})
            network.eval()
        else:
            network.fit(texts, labels)
            if kept and file:
                whole = {name: value.numpy() for name, value in network.state_dict().items()}
                np.savez(kept / ".unfinished.npz", **whole)
                (kept / ".unfinished.npz").replace(file)
        networks.append(network)
    rows = features.of(ids, source)
    weights = ratios(rows, source.labels)
    return Voters(tuple(networks), task.fit(rows @ weights, source.labels), weights, features)


def ratios(rows: Any, labels: task.Labels) -> Any:
    """Returns a diagonal matrix: how much likelier each feature is in texts of label 1 than in others, as a logarithm."""
    import scipy.sparse as sp

    counts = [
        np.asarray(rows[labels == 1].sum(axis=0)).ravel() + 1.0,
        np.asarray(rows[labels != 1].sum(axis=0)).ravel() + 1.0,
    ]
    return sp.diags(np.log(counts[0] / (labels == 1).sum()) - np.log(counts[1] / (labels != 1).sum()))


def split_texts(ids: task.Ids, source: task.Corpus) -> list[np.ndarray]:
    """Returns the words of each text as rows of a network's table; a text without words is one unknown word."""
    rows = np.where(ids >= 0, ids + RESERVED, UNKNOWN)
    starts = np.searchsorted(source.example, np.arange(1, len(source.labels)))
    return [text[:LONGEST] if len(text) else np.array([UNKNOWN]) for text in np.split(rows, starts)]


class Network(nn.Module):  # type: ignore[misc]
    """A network over two vectors for each word."""

    def __init__(
        self,
        sort: str,
        vectors: Float32[np.ndarray, "words hidden"],
        ratings: Float32[np.ndarray, " words"],
        labels: int,
        generator: torch.Generator,
    ) -> None:
        """Takes the public vectors and draws the weights."""
        super().__init__()
        self.sort, self._generator = sort, generator
        table = np.concatenate([np.zeros((RESERVED, vectors.shape[1]), dtype=np.float32), vectors])
        table *= LENGTH / max(float(np.linalg.norm(vectors, axis=1).mean()), 1e-12)
        rated = np.concatenate([np.zeros(RESERVED, dtype=np.float32), ratings])[:, None]
        fixed = np.concatenate([table, rated, np.abs(rated)], axis=1)
        self.tuned = nn.Embedding.from_pretrained(
            torch.from_numpy(table), freeze=False, padding_idx=PADDING, sparse=True
        )
        self.fixed = nn.Embedding.from_pretrained(torch.from_numpy(fixed), freeze=True, padding_idx=PADDING)
        width, hidden = table.shape[1] + fixed.shape[1], HIDDEN[sort]
        if sort == AVERAGING:
            self.body: nn.Module = nn.Linear(2 * width, hidden)
        elif sort == RECURRENT:
            self.body = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        else:
            self.body = nn.ModuleList([nn.Conv1d(width, hidden, size, padding=size - 1) for size in WIDTHS])
        self.head = nn.Linear(hidden * {AVERAGING: 1, CONVOLUTIONAL: len(WIDTHS), RECURRENT: 2}[sort], labels)
        for part in (self.body, self.head):
            for weights in part.parameters():
                bound = weights[0].numel() ** -0.5 if weights.dim() > 1 else 0.0
                nn.init.uniform_(weights, -bound, bound, generator=generator)

    def forward(self, words: Tensor) -> Tensor:
        """Returns one score per text and label for rows of words, padded at the end."""
        held = words != PADDING
        if self.training:
            hidden = torch.rand(words.shape, generator=self._generator) < WORD_DROPOUT
            words = torch.where(hidden & held, UNKNOWN, words)
        inputs = self._drop(torch.cat([self.tuned(words), self.fixed(words)], dim=2), INPUT_DROPOUT)
        if self.sort == AVERAGING:
            mean = (inputs * held[:, :, None]).sum(dim=1) / held.sum(dim=1, keepdim=True)
            highest = inputs.masked_fill(~held[:, :, None], -LENGTH).amax(dim=1)
            pooled = functional.relu(self.body(torch.cat([mean, highest], dim=1)))
        elif self.sort == RECURRENT:
            states, _ = self.body(inputs)
            pooled = states.masked_fill(~held[:, :, None], -1.0).amax(dim=1)
        else:
            pooled = torch.cat([functional.relu(part(inputs.mT)).amax(dim=2) for part in self.body.children()], dim=1)
        return self.head(self._drop(pooled, DROPOUT))

    def fit(self, texts: list[np.ndarray], labels: Tensor) -> None:
        """Trains on texts of like length together."""
        lengths = torch.tensor([len(text) for text in texts])
        epochs = EPOCHS[self.sort]
        steps = epochs * (-(-len(texts) // BATCH))
        weights = [part for name, part in self.named_parameters() if not name.startswith(("tuned", "fixed"))]
        # The sparse one spends no time on words that a batch does not have.
        optimisers = torch.optim.Adam(weights, lr=RATE), torch.optim.SparseAdam([self.tuned.weight], lr=RATE)
        falling = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1.0 - step / steps) for one in optimisers]
        self.train()
        for _ in range(epochs):
            order = torch.argsort(lengths + 4.0 * torch.rand(len(texts), generator=self._generator))
            batches = order.split(BATCH)
            for place in torch.randperm(len(batches), generator=self._generator).tolist():
                chosen = batches[place]
                scores = self(_padded([texts[row] for row in chosen.tolist()]))
                self.zero_grad()
                functional.cross_entropy(scores, labels[chosen]).backward()
                for one in (*optimisers, *falling):
                    one.step()
        self.eval()

    def probabilities(self, texts: list[np.ndarray]) -> Float64[np.ndarray, "examples labels"]:
        """Returns the probability of each label for each text."""
        with torch.no_grad():
            parts = [self(_padded(texts[start : start + BATCH])) for start in range(0, len(texts), BATCH)]
        return functional.softmax(torch.cat(parts).double(), dim=1).numpy()

    def _drop(self, values: Tensor, share: float) -> Tensor:
        if not self.training:
            return values
        kept = torch.rand(values.shape, generator=self._generator) >= share
        return values * kept / (1.0 - share)


def _padded(texts: list[np.ndarray]) -> Tensor:
    made = np.full((len(texts), max(len(text) for text in texts)), PADDING)
    for row, text in zip(made, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(made)
