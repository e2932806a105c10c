"""Texts to vectors by which they are grouped: from their words, or by an embedding model."""

# scikit-learn takes seconds to import: that is left to the functions that need it. Worker processes do without.

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from urllib.parse import urlsplit

import numpy as np
import requests
from requests.adapters import HTTPAdapter, Retry
from scipy.sparse import csr_matrix, vstack

from spell_megatron.corpus.texts import words
from spell_megatron.corpus.word_sequences import word_hashes
from spell_megatron.corpus.workers import ordered_map
from spell_megatron.errors import UserError

FEATURES = 2**18
DIMENSIONS = 128
SAMPLE = 20_000
"""Most texts that the weights of words and the dimensions are learnt from."""
_REQUEST_TEXTS = 32
_REQUESTS = 8
_RETRIES = 6


def embed_words(
    sample: Iterable[list[str]], batches: Iterable[list[str]], workers: int, seed: int
) -> Iterator[np.ndarray]:
    """TF-IDF vectors reduced by singular values (latent semantic analysis), of each batch [texts, dimensions].

    Args:
        sample: batches of texts to learn the weights and dimensions from. With at most `DIMENSIONS` texts these must
            be all texts, and the vectors are the whole TF-IDF vectors.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfTransformer

    sample = list(sample)
    count = functools.partial(_count_words, stop_words=ENGLISH_STOP_WORDS)
    counted = ordered_map(count, itertools.chain(sample, batches), workers)
    counts = vstack(list(itertools.islice(counted, len(sample))))
    few = counts.shape[0] <= DIMENSIONS
    # A word of a single text makes it like no other.
    columns = np.flatnonzero(np.bincount(counts.indices, minlength=counts.shape[1]) >= (1 if few else 2))
    counts = counts[:, columns]
    tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
    if few or len(columns) <= DIMENSIONS:
        reduce = csr_matrix.toarray
    else:
        svd = TruncatedSVD(DIMENSIONS, n_iter=2, random_state=seed).fit(tfidf.transform(counts))
        reduce = svd.transform
    del counts, sample
    for batch in counted:
        yield unit(reduce(tfidf.transform(batch[:, columns])))


def _count_words(texts: Sequence[str], stop_words: Set[str]) -> csr_matrix:
    """How often each word occurs, stop words aside [texts, FEATURES]; the hash of a word is its column."""
    columns, counts = [], []
    for text in texts:
        kept = [word for word in words(text) if word not in stop_words]
        own = np.unique(word_hashes(kept) % np.uint64(FEATURES), return_counts=True)
        columns.append(own[0].astype(np.int32))
        counts.append(own[1].astype(np.float32))
    places = np.cumsum([0, *map(len, columns)])
    return csr_matrix((np.concatenate(counts), np.concatenate(columns), places), shape=(len(texts), FEATURES))


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def embed_by_server(batches: Iterable[list[str]], url: str, model: str) -> Iterator[np.ndarray]:
    """Unit vectors of an OpenAI-compatible server [texts, dimensions], one array for each batch.

    Its key is taken from the environment variable SPELL_API_KEY. Failures of the network and of a busy server are
    tried again for about a minute.

    Raises:
        UserError: if the server does not answer, refuses, or answers with something else.
    """
    session = requests.Session()
    session.trust_env = not _is_this_machine(url)  # a proxy would look for it on its own machine
    retries = Retry(_RETRIES, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries, pool_maxsize=_REQUESTS))
    session.headers["Authorization"] = f"Bearer {os.environ.get('SPELL_API_KEY', 'none')}"
    address = f"{url.rstrip('/')}/embeddings"

    def ask(texts: list[str]) -> np.ndarray:
        body = {"model": model, "input": texts, "encoding_format": "float"}
        try:
            response = session.post(address, json=body, timeout=600)
        except requests.RequestException as error:
            raise UserError(
                f"The embedding server {address} does not answer: {error}. Start it, correct --embedding-url, and run "
                "the same command again: what is finished is not repeated."
            ) from error
        if not response.ok:
            raise UserError(
                f"The embedding server {address} refuses: HTTP {response.status_code}: {response.text[:500]}. If a "
                "text is too long for the model, give a smaller --embedding-chars; a key is taken from SPELL_API_KEY."
            )
        try:
            rows = sorted(response.json()["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"The embedding server {address} answers with no list of vectors ({error}).") from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise UserError(f"The embedding server {address} gives {len(vectors)} vectors for {len(texts)} texts.")
        return vectors

    with ThreadPoolExecutor(_REQUESTS) as pool:
        for batch in batches:
            requests_ = [batch[i : i + _REQUEST_TEXTS] for i in range(0, len(batch), _REQUEST_TEXTS)]
            yield unit(_finite(np.concatenate(list(pool.map(ask, requests_))), model))


def embed_by_vllm(batches: Iterable[list[str]], model: str) -> Iterator[np.ndarray]:
    """Unit vectors of an embedding model that vLLM runs in this process [texts, dimensions], an array for each batch.

    Texts longer than the model's context are cut by vLLM.

    Raises:
        UserError: if vLLM cannot be used or cannot load the model.
    """
    try:
        import torch
        import vllm
    except ImportError as error:
        raise UserError(
            f"--embedding-model needs vLLM, which cannot be imported: {error}. Install spell_megatron with the extra "
            "gpu or cpu, or name a running server with --embedding-url."
        ) from error
    settings = {}
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        settings = {"dtype": "float32", "kv_cache_memory_bytes": 2**30, "enforce_eager": True}
    try:
        engine = vllm.LLM(model, runner="pooling", **settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"vLLM cannot load the embedding model {model}: {error}") from error
    for batch in batches:
        outputs = engine.embed(batch, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": -1})
        yield unit(_finite(np.array([output.outputs.embedding for output in outputs], np.float32), model))


def _finite(vectors: np.ndarray, model: str) -> np.ndarray:
    if not np.isfinite(vectors).all():
        raise UserError(f"The embedding model {model} gives numbers that are not finite. Try it in another precision.")
    return vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32; rows of zeros stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
