"""What a trained retriever must beat.

BM25, the classic of keyword search, is here; the other baseline, the nearest document by
cosine, needs no code of its own: it is the program at the initial theta (``evaluate_theta``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from carpool.data.corpus import Document, Example
from carpool_device.evaluation.evaluate import index_answers
from carpool_device.evaluation.metrics import Ranking, ranks_of

BM25_SETTINGS = {"method": "lucene", "k1": 1.5, "b": 0.75}
"""bm25s's defaults; neither they nor its English stop words were tuned here."""


def evaluate_bm25(
    documents: Sequence[Document],
    examples_by_client: Mapping[str, Sequence[Example]],
    *,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Ranking:
    """Where BM25 over ``Document.passage`` puts each query's right document.

    Words are lower-cased runs of two or more word characters without English stop words, not
    stemmed. A query that shares no word with any document scores 0 everywhere.

    Args:
        documents: the catalogue.
        examples_by_client: clients without examples are left out.
        on_progress: called with the number of queries just done.

    Raises:
        DeviceError: no query at all, or an unknown document id.

    Source: Robertson and Zaragoza, The Probabilistic Relevance Framework (2009), through the
    library bm25s.
    """
    import bm25s  # noqa: PLC0415  brings scipy; commands that rank nothing skip it

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG

    def split_into_words(texts: list[str]) -> list[list[str]]:
        words: list[list[str]] = bm25s.tokenize(
            texts, stopwords="en", return_ids=False, show_progress=False
        )
        return words

    index = {document.id: place for place, document in enumerate(documents)}
    right, client, clients = index_answers(examples_by_client, index)
    retriever = bm25s.BM25(**BM25_SETTINGS)
    retriever.index(split_into_words([d.passage for d in documents]), show_progress=False)
    texts = [e.query for examples in examples_by_client.values() for e in examples]
    ranks = np.zeros(right.size, dtype=np.int64)
    for place, words in enumerate(split_into_words(texts)):
        # bm25s refuses an empty query
        scores = retriever.get_scores(words) if words else np.zeros(len(documents), np.float32)
        ranks[place] = ranks_of(scores[None, :], right[place : place + 1])[0]
        on_progress(1)
    return Ranking(ranks=ranks, client=client, clients=clients)
