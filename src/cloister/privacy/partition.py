"""Partitions vectors into classes of neighbours of about equal size.

Covers: balanced clustering by recursive bisection, for up to a few hundred thousand vectors. Does not cover: what may
share a class (see `privacy.vocabulary`): it is called once for each type.
"""

import numpy as np
from jaxtyping import Float32, Int64

LLOYD_ROUNDS = 6
SKETCH_DIMENSIONS = 128
"""Vectors are clustered by this many principal directions; similarities are computed from whole vectors."""
BLOCK_ROWS = 8192

Vectors = Float32[np.ndarray, "members hidden"]


def centred(vectors: Vectors) -> Vectors:
    """Returns the vectors less their mean, each of length 1 (a vector equal to the mean stays zero)."""
    result = vectors - vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    lengths = np.linalg.norm(result, axis=1, keepdims=True)
    np.divide(result, np.maximum(lengths, 1e-12), out=result)
    return result


def sketch(vectors: Vectors, dimensions: int = SKETCH_DIMENSIONS) -> Float32[np.ndarray, "members _"]:
    """Returns the vectors in their leading principal directions, found by a randomised range finder (seeded: public data).

    Vectors that have no more dimensions than that come back as they are.
    """
    hidden = vectors.shape[1]
    if hidden <= dimensions:
        return vectors
    basis = np.random.default_rng(0).standard_normal((hidden, dimensions), dtype=np.float32)
    for _ in range(2):
        image = np.zeros_like(basis)
        for start in range(0, len(vectors), BLOCK_ROWS):
            block = vectors[start : start + BLOCK_ROWS]
            image += block.T @ (block @ basis)
        basis = np.linalg.qr(image)[0].astype(np.float32)
    return vectors @ basis


def partition(vectors: Vectors, members: int) -> list[Int64[np.ndarray, " _"]]:
    """Returns the rows of each class: floor(n / members) classes (at least one), their sizes within one of each other.

    A class has at least `members` rows unless there are fewer in all, and fewer than twice as many.
    """
    classes: list[np.ndarray] = []
    waiting = [(np.arange(len(vectors)), max(1, len(vectors) // members))]
    while waiting:
        rows, count = waiting.pop()
        if count == 1:
            classes.append(np.sort(rows))
            continue
        left = count // 2
        near, far = _bisect(vectors[rows], round(len(rows) * left / count))
        waiting += [(rows[near], left), (rows[far], count - left)]
    return sorted(classes, key=lambda rows: int(rows[0]))


def _bisect(vectors: Vectors, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of two halves, the first with `size` rows: 2-means in which the sizes are given."""
    centre = vectors.mean(axis=0)
    offset = vectors - centre
    axis = offset[int((offset**2).sum(axis=1).argmax())]
    for _ in range(3):  # power iteration towards the longest direction
        axis = offset.T @ (offset @ axis)
        axis /= max(float(np.linalg.norm(axis)), 1e-12)
    order = np.argsort(-(vectors @ axis), kind="stable")
    for _ in range(LLOYD_ROUNDS):
        direction = vectors[order[:size]].mean(axis=0) - vectors[order[size:]].mean(axis=0)
        new = np.argsort(-(vectors @ direction), kind="stable")
        if np.array_equal(np.sort(new[:size]), np.sort(order[:size])):
            break
        order = new
    return order[:size], order[size:]
