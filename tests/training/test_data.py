import json
import time

import numpy as np
import pytest

from composable.corpora.documents import Document
from composable.errors import TextError
from composable.model.tokenizer import ByteTokenizer
from composable.training.data import TappedRows, batches, tapped_batches, token_stream

WINDOW = 8
# Token i of the stream is i, so that a row tells where it was cut.
STREAM = np.arange(8 * 12 + 3)
N_WINDOWS = (len(STREAM) - WINDOW - 1) // WINDOW


def take(n, *, batch_size=4, seed=0, **kwargs):
    data = batches(STREAM, window=WINDOW, batch_size=batch_size, seed=seed, **kwargs)
    return [np.asarray(next(data)) for _ in range(n)]


def starts_of(rows):
    return [int(row[0]) for row in rows]


def test_rows_are_runs_of_the_stream():
    for batch_BT in take(20):
        assert batch_BT.shape == (4, WINDOW + 1)
        assert batch_BT.dtype == np.int32
        for row_T in batch_BT:
            np.testing.assert_array_equal(row_T, row_T[0] + np.arange(WINDOW + 1))
            assert 0 <= row_T[0] <= len(STREAM) - WINDOW - 1


def test_a_seed_fixes_every_batch():
    np.testing.assert_array_equal(take(10, seed=3), take(10, seed=3))
    assert starts_of(np.concatenate(take(10, seed=3))) != starts_of(
        np.concatenate(take(10, seed=4))
    )


def test_an_epoch_takes_every_window_once_in_another_order_at_other_offsets():
    assert N_WINDOWS == 11
    rows = np.concatenate(take(4 * N_WINDOWS, batch_size=1))
    epochs = np.array(starts_of(rows)).reshape(4, N_WINDOWS)
    windows, offsets = epochs // WINDOW, epochs % WINDOW
    for epoch in windows:
        assert sorted(epoch) == list(range(N_WINDOWS))
    assert len({tuple(epoch) for epoch in windows}) == 4
    by_window = np.take_along_axis(offsets, np.argsort(windows, axis=1), axis=1)
    assert len({tuple(epoch) for epoch in by_window}) == 4
    assert len(set(offsets.ravel())) == WINDOW


@pytest.mark.parametrize("n_processes", [2, 4])
def test_processes_share_each_batch_out_among_them(n_processes):
    whole = take(8)
    shares = [take(8, process=p, n_processes=n_processes) for p in range(n_processes)]
    for i, batch_BT in enumerate(whole):
        rows = [row for share in shares for row in share[i]]
        assert len(rows) == len(batch_BT)
        assert sorted(starts_of(rows)) == sorted(starts_of(batch_BT))


def test_a_saved_position_goes_on_with_the_same_batches():
    data = batches(STREAM, window=WINDOW, batch_size=4, seed=0)
    for _ in range(5):
        next(data)
    state = json.loads(json.dumps(data.get_state()))  # as a checkpoint keeps it
    expected = [np.asarray(next(data)) for _ in range(5)]
    again = batches(STREAM, window=WINDOW, batch_size=4, seed=0)
    again.set_state(state)
    np.testing.assert_array_equal([np.asarray(next(again)) for _ in range(5)], expected)


def test_a_stream_of_one_row_is_enough_and_less_is_not():
    row_T = np.arange(WINDOW + 1)
    data = batches(row_T, window=WINDOW, batch_size=2, seed=0)
    np.testing.assert_array_equal(next(data), [row_T, row_T])
    with pytest.raises(TextError, match="8 tokens of text, but one row takes 9"):
        batches(row_T[:-1], window=WINDOW, batch_size=2, seed=0)


def test_few_rows_are_in_memory_ahead_of_their_step():
    read = []

    class Stored:
        def __getitem__(self, index):
            read.append(index)
            return np.zeros((WINDOW, 4), np.float32)

    rows = TappedRows(np.zeros((1000, WINDOW + 1), np.int32), Stored())
    data = tapped_batches(rows, batch_size=4, seed=0)
    next(data)
    time.sleep(0.5)
    # Its own, two that wait, and one that waits for room.
    assert 4 <= len(read) <= 4 * 4


def test_every_document_begins_with_the_begin_token():
    documents = [Document("a", "xy"), Document("b", "ü")]
    tokens = token_stream(documents, ByteTokenizer())
    np.testing.assert_array_equal(tokens, [0, *b"xy", 0, *"ü".encode()])


def test_no_documents_are_refused():
    with pytest.raises(TextError, match="no documents"):
        token_stream([], ByteTokenizer())
