"""Wrong labels put into a data set on purpose, in exact numbers and reproducibly.

The kinds of `corrupt_labels`, with τ the rate and C the number of classes:

- `"symmetric"`: to one of the C − 1 *other* classes, each alike.
- `"pair"`: to the next class in order, the last one to the first.
- `"matrix"`: by T[i, j] = P(noisy = j | clean = i). Of the n_i rows of clean class i, n_i T[i, j] become j,
  rounded by largest remainder.
- `"instance"`: depends on the text. Row i is chosen with probability q_i, drawn from a normal distribution
  with mean τ and standard deviation 0.1 truncated to [0, 1]; its wrong class is drawn from
  softmax(x_i W_y) over the classes other than its own, y, with W_y ~ N(0, 1) of shape (S, C) (Xia et al.,
  Part-dependent label noise, NeurIPS 2020, arXiv 2006.07836, Algorithm 2). As x_i serve the first 32 latent
  semantic dimensions of the texts (TF-IDF and truncated SVD): they place texts by topic, so texts of like
  content are mislabelled alike, as annotators do; they need no model, so the noise favours none.
  `features` takes their place where given. Either is centred and scaled to unit variance over all entries.

What a row gets depends on the seed, on its own content (all columns) and on the multiset of rows, never on
its position: shuffling, and undoing it, changes nothing, and no batching or worker count enters. Rows equal
in every column are told apart by their order of appearance. For "symmetric" and "pair", moreover, a lower
rate mislabels a subset of the rows that a higher rate does, to the same classes. Add columns (tokens, say)
after corrupting, for they are content too.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_reset.errors import ConfigError, DataError, NoEffectWarning
from hf_reset.noise.matrices import check_rate, noise_rate, transition_matrix

if TYPE_CHECKING:
    from datasets import Dataset

NoiseKind = Literal["symmetric", "pair", "matrix", "instance"]

_ADDED = ("clean_label", "is_mislabelled")
_RATE_SPREAD = 0.1  # standard deviation of the flip rates of instance noise, as in Xia et al. 2020
_COMPONENTS = 32  # dimensions of the text representation


def corrupt_labels(
    dataset: Dataset,
    *,
    rate: float | None = None,
    kind: NoiseKind = "symmetric",
    seed: int = 0,
    column: str = "label",
    matrix: ArrayLike | None = None,
    text_column: str | Sequence[str] | None = None,
    features: ArrayLike | None = None,
) -> Dataset:
    """Give some rows a wrong label, and say which.

    For all kinds but "matrix" exactly `round(rate * len(dataset))` rows change. The kinds, and what decides about a
    row, stand at the top of `hf_reset.noise.labels`.

    Args:
        dataset: A `datasets.Dataset` with labels that are `ClassLabel`, integers or strings.
        rate: τ in [0, 1]. With `kind="matrix"` the matrix fixes it; it may be left out, and must agree if given.
        kind: One of the four above.
        seed: Selects the noise; no global generator is used.
        column: Name of the label column. Its type is kept.
        matrix: T, shape (C, C), for `kind="matrix"`; classes in the order of `ClassLabel.names`, or else of the
            sorted values.
        text_column: For `kind="instance"`: the column, or columns, of text. Default: the only one of text.
        features: For `kind="instance"`: shape (N, S), one row for each row of `dataset`, instead of text.

    Returns:
        The data set with `column` noisy, and `clean_label` (of the same type) and `is_mislabelled` (bool)
        added.

    Raises:
        ConfigError: `rate`, `kind` or `matrix` cannot be, or do not go together.
        DataError: The data set or its label column cannot be used: empty, absent (those present are listed), other
            than integers or strings, null, one class only; or the columns to be added are there already.
        ImportError: `kind="instance"` on text without scikit-learn (extra `recipes`).

    Example:
        >>> from datasets import Dataset
        >>> data = Dataset.from_dict({"text": list("abcdefghij"), "label": [0, 1] * 5})
        >>> noisy = corrupt_labels(data, rate=0.4, kind="symmetric", seed=0)
        >>> sum(noisy["is_mislabelled"])
        4
    """
    _check_arguments(kind, rate, matrix, features, text_column)
    _check_dataset(dataset, column)
    labels = _read_labels(dataset, column)
    rows = _draws(dataset, seed)
    if matrix is not None:
        noisy = _by_matrix(labels, rows, transition_matrix(matrix, len(labels.values)), rate)
    else:
        count = _wrong_count(rate, len(dataset))
        if kind == "instance":
            noisy = _by_instance(labels, rows, count, _represent(dataset, rows, seed, text_column, features), seed)
        else:
            chosen = np.argsort(rows.uniform[:, 0], kind="stable")[:count]
            noisy = labels.codes.copy()
            noisy[chosen] = _other_class(kind, labels, rows)[chosen]
    return _with_noise(dataset, column, labels, noisy)


def _wrong_count(rate: float | None, rows: int) -> int:
    assert rate is not None  # by `_check_arguments`
    count = round(check_rate(rate) * rows)
    if rate and not count:
        message = f"`rate` {rate} of {rows} rows rounds to none: every label stays as it is."
        warnings.warn(message, NoEffectWarning, stacklevel=3)
    return count


class _Labels(NamedTuple):
    codes: NDArray[np.int64]  # (N,) class numbers
    values: Sequence[object]  # (C,) what stands in the column for each class number


class _Rows(NamedTuple):
    uniform: NDArray[np.float64]  # (N, 3) numbers in [0, 1) that belong to each row
    order: NDArray[np.int64]  # (N,) an order of the rows that does not depend on their positions


def _check_arguments(kind: str, rate: float | None, matrix: object, features: object, text_column: object) -> None:
    kinds = get_args(NoiseKind)
    if kind not in kinds:
        raise ConfigError(f"`kind` must be one of {', '.join(kinds)}, got {kind!r}.")
    if rate is not None:
        check_rate(rate)
    elif kind != "matrix":
        raise ConfigError(f'`rate` must be given for kind="{kind}": the share of labels to make wrong, in [0, 1].')
    if (matrix is not None) != (kind == "matrix"):
        verb = "needs" if kind == "matrix" else "takes no"
        raise ConfigError(f'kind="{kind}" {verb} `matrix`; it goes with kind="matrix" and only there.')
    if kind != "instance" and not (features is None and text_column is None):
        raise ConfigError(f'`features` and `text_column` go with kind="instance", got kind="{kind}".')


def _check_dataset(dataset: object, column: str) -> None:
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise DataError(
            f"`dataset` must be a datasets.Dataset, got {type(dataset).__name__}. Pass one split of a DatasetDict; "
            "load a stream into memory first."
        )
    if not len(dataset):
        raise DataError("`dataset` must hold rows, got an empty one.")
    if column not in dataset.column_names:
        raise DataError(
            f"`column` {column!r} is not in the data set. Its columns are {', '.join(dataset.column_names)}."
        )
    taken = [name for name in _ADDED if name in dataset.column_names]
    if taken:
        raise DataError(
            f"`dataset` already has the column {' and '.join(taken)}: it was corrupted before. Corrupt the clean data, "
            "or rename what is there."
        )


def _read_labels(dataset: Dataset, column: str) -> _Labels:
    """Class numbers of the label column, or an error that says what is wrong with it."""
    from datasets import ClassLabel

    raw = dataset.select_columns(column).with_format("arrow")[:][column].to_pylist()
    nulls = [index for index, value in enumerate(raw) if value is None]
    if nulls:
        raise DataError(
            f"Column {column!r} has no label in {len(nulls)} rows (the first is row {nulls[0]}). Drop them first."
        )
    strange = next((value for value in raw if not isinstance(value, (int, str))), None)
    if strange is not None:
        raise DataError(f"Column {column!r} must hold integers or strings, one a row, got {strange!r}. Cast it first.")
    present = sorted(set(raw))
    if len(present) < 2:
        raise DataError(f"Column {column!r} must hold at least two classes, got only {present[0]!r}.")
    feature = dataset.features[column]
    values = list(range(len(feature.names))) if isinstance(feature, ClassLabel) else present
    code_of = {value: code for code, value in enumerate(values)}
    unknown = [value for value in present if value not in code_of]
    if unknown:
        raise DataError(
            f"Column {column!r} holds {unknown[0]!r}, which is none of its {len(values)} classes (-1 means: no label). "
            "Drop these rows first."
        )
    return _Labels(np.array([code_of[value] for value in raw], dtype=np.int64), values)


def _draws(dataset: Dataset, seed: int) -> _Rows:
    """Numbers and an order that depend on what the rows hold, not on where they stand."""
    seen: Counter[bytes] = Counter()
    identities = []
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        table: Any = batch  # in the arrow format, a table
        for row in table.to_pylist():
            content = hashlib.blake2b(repr(sorted(row.items())).encode("utf-8", "replace"), digest_size=16).digest()
            identities.append(content + seen[content].to_bytes(8, "big"))
            seen[content] += 1
    digests = [hashlib.blake2b(f"noise:{seed}:".encode() + key, digest_size=24).digest() for key in identities]
    bits = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 3)
    order = np.array(sorted(range(len(identities)), key=identities.__getitem__), dtype=np.int64)
    return _Rows((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53, order)


def _other_class(kind: str, labels: _Labels, rows: _Rows) -> NDArray[np.int64]:
    """The wrong class that each row would get under symmetric or pair noise, shape (N,)."""
    classes = len(labels.values)
    step = np.ones(len(labels.codes), dtype=np.int64)
    if kind == "symmetric":
        step += np.floor(rows.uniform[:, 1] * (classes - 1)).astype(np.int64)
    return (labels.codes + step) % classes


def _by_matrix(labels: _Labels, rows: _Rows, matrix: NDArray[np.float64], rate: float | None) -> NDArray[np.int64]:
    class_counts = np.bincount(labels.codes, minlength=len(labels.values))
    implied = noise_rate(matrix, class_counts.tolist())
    if rate is not None and abs(rate - implied) > len(labels.values) / len(labels.codes):
        raise ConfigError(
            f"`rate` {rate} contradicts `matrix`, which makes {implied:.4g} of these rows wrong. Leave `rate` out."
        )
    noisy = labels.codes.copy()
    for code, total in enumerate(class_counts):
        members = np.flatnonzero(labels.codes == code)
        members = members[np.argsort(rows.uniform[members, 0], kind="stable")]
        noisy[members] = np.repeat(np.arange(len(labels.values)), _largest_remainder(matrix[code], int(total)))
    return noisy


def _largest_remainder(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers that sum to `total` and differ from `shares * total` by less than 1."""
    exact = shares * total
    counts = np.floor(exact + 1e-9).astype(np.int64)  # 0.29 * 100 is 28.999…
    missing = total - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def _by_instance(labels: _Labels, rows: _Rows, count: int, points: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    classes = len(labels.values)
    scores = np.empty((len(points), classes))
    for code in range(classes):
        weights = np.random.default_rng([abs(seed), code]).standard_normal((points.shape[1], classes))
        scores[labels.codes == code] = points[labels.codes == code] @ weights
    scores[np.arange(len(scores)), labels.codes] = -np.inf
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    cumulative = np.cumsum(odds, axis=1)
    # The first class whose cumulative share exceeds the row's number; its own class has no share.
    target = (cumulative > rows.uniform[:, 1:2] * cumulative[:, -1:]).argmax(axis=1)
    chosen = _sample_exactly(_flip_rates(rows.uniform[:, 2], count / len(points)), count, rows)
    noisy = labels.codes.copy()
    noisy[chosen] = target[chosen]
    return noisy


def _flip_rates(uniform: NDArray[np.float64], mean: float) -> NDArray[np.float64]:
    """Truncated normal on [0, 1] around `mean`, by inverting its distribution function, shape (N,)."""
    normal = NormalDist(mean, _RATE_SPREAD)
    low, high = normal.cdf(0), normal.cdf(1)
    inside = np.clip(low + uniform * (high - low), 1e-15, 1 - 1e-15)
    return np.clip([normal.inv_cdf(p) for p in inside.tolist()], 1e-9, 1.0)


def _sample_exactly(weights: NDArray[np.float64], count: int, rows: _Rows) -> NDArray[np.int64]:
    """Choose `count` rows, row i with probability min(1, c weights[i]), c such that these sum to `count`.

    Systematic sampling (Madow, Annals of Mathematical Statistics 20, 1949), in an order that is random but
    belongs to the rows.
    """
    low, high = 0.0, 1 / weights.min()
    for _ in range(200):  # the sum grows with c
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * weights).sum() < count else (low, middle)
    order = np.argsort(rows.uniform[:, 0], kind="stable")
    cumulative = np.cumsum(np.minimum(1, high * weights)[order])
    cumulative *= count / cumulative[-1] if count else 0.0
    picks = np.searchsorted(cumulative, np.arange(count) + 0.5)
    return order[np.minimum(picks, len(order) - 1)]


def _represent(
    dataset: Dataset, rows: _Rows, seed: int, text_column: str | Sequence[str] | None, features: ArrayLike | None
) -> NDArray[np.float64]:
    """Points of mean 0 and variance 1, shape (N, S), in an order that makes rounding independent of places."""
    if features is not None:
        points = np.asarray(features, dtype=np.float64)
        if points.ndim != 2 or len(points) != len(dataset) or not np.isfinite(points).all():
            raise ConfigError(
                f"`features` must be finite numbers of shape ({len(dataset)}, S), a row for each row of `dataset`, got "
                f"shape {points.shape}."
            )
        canonical = points[rows.order]
    else:
        texts = _texts(dataset, text_column)
        canonical = _latent_semantics([texts[index] for index in rows.order], seed)
    # One scale for all dimensions: the leading ones, which tell topics apart, keep their weight.
    canonical = canonical - canonical.mean(axis=0)
    canonical = canonical / (canonical.std() or 1.0)
    standard = np.empty_like(canonical)
    standard[rows.order] = canonical
    return standard


def _texts(dataset: Dataset, text_column: str | Sequence[str] | None) -> list[str]:
    from datasets import Value

    names = [text_column] if isinstance(text_column, str) else list(text_column or [])
    of_text = [
        name for name, feature in dataset.features.items() if feature in (Value("string"), Value("large_string"))
    ]
    if not names:
        names = ["text"] if "text" in of_text else of_text
        if len(names) != 1:
            raise DataError(
                f"`text_column` must be given: the data set has {len(of_text)} columns of text ({', '.join(of_text)})."
            )
    absent = [name for name in names if name not in dataset.column_names]
    if absent:
        raise DataError(
            f"`text_column` {absent[0]!r} is not in the data set. Its columns are {', '.join(dataset.column_names)}."
        )
    plain = dataset.select_columns(names).with_format(None)[:]
    columns = [plain[name] for name in names]
    texts = list(zip(*columns, strict=True))
    bad = next((i for i, parts in enumerate(texts) if not all(isinstance(part, str) for part in parts)), None)
    if bad is not None:
        raise DataError(f"Row {bad} has {texts[bad]!r} for {', '.join(names)} where text is needed. Drop such rows.")
    return [" ".join(parts) for parts in texts]


def _latent_semantics(texts: list[str], seed: int) -> NDArray[np.float64]:
    """First dimensions of latent semantic analysis, shape (N, at most 32) (Deerwester et al. 1990)."""
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError(
            'kind="instance" on text needs scikit-learn: pip install "hf-reset[recipes]", or pass `features`.'
        ) from error
    try:
        weighted = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    except ValueError as error:  # an empty vocabulary
        raise DataError("`text_column` holds no words to tell texts apart by. Pass `features` instead.") from error
    components = min(_COMPONENTS, min(weighted.shape) - 1)
    if components < 1:
        return weighted.toarray()
    return TruncatedSVD(components, random_state=abs(seed) % 2**32).fit_transform(weighted)


def _with_noise(dataset: Dataset, column: str, labels: _Labels, noisy: NDArray[np.int64]) -> Dataset:
    feature, names = dataset.features[column], dataset.column_names
    given = [labels.values[code] for code in noisy]
    wrong = (noisy != labels.codes).tolist()
    result: Any = dataset.rename_column(column, "clean_label")  # `add_column` takes lists, whatever its annotation says
    result = result.add_column(column, given, feature=feature).add_column("is_mislabelled", wrong)
    return result.select_columns([*names, *_ADDED])
