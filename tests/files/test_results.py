"""Results of units in a shared folder: claims, processes that are gone, and the ledger."""

import json
import multiprocessing
import os
import threading

import pytest

from composable.files import results as module
from composable.files.results import Results
from composable.interface import digest_bytes

KEY = digest_bytes(b"a unit")


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results")


def claim_file(results, attempt=0):
    name = KEY.removeprefix("sha256:")
    return results.root / "claims" / name[:2] / f"{name}.{attempt}"


def pretend(results, attempt=0, **owner):
    """Rewrite a claim as if another process had made it."""
    path = claim_file(results, attempt)
    path.write_text(json.dumps({**json.loads(path.read_text()), **owner}))


def test_a_unit_is_claimed_once_and_its_result_read_by_all(results):
    with results.claim(KEY) as claim:
        assert (claim.key, claim.attempt) == (KEY, 0)
        with Results(results.root).claim(KEY) as other:
            assert other is None, "this process is computing it"
        assert not results.has(KEY)
        assert results.put(claim, b"4")
    with results.claim(KEY) as again:
        assert again is None, "it has a result"
    assert Results(results.root).read(KEY) == b"4"
    ledger = results.count([KEY])
    assert (ledger.n_recorded, ledger.n_begun, ledger.n_repeated, ledger.n_abandoned) == (
        *(1, 1, 0, 0),
    )


def test_of_many_that_try_one_gets_it(results):
    start, held, claims = threading.Barrier(8), threading.Barrier(8), []

    def try_to_claim():
        start.wait()
        with Results(results.root).claim(KEY) as claim:
            claims.append(claim)
            held.wait()

    threads = [threading.Thread(target=try_to_claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in claims) == 1


def claim_and_die(root):
    with Results(root).claim(KEY):
        os._exit(9)


def test_a_unit_of_a_process_of_this_machine_that_is_gone_is_taken_over_at_once(results):
    process = multiprocessing.get_context("spawn").Process(
        target=claim_and_die, args=(results.root,)
    )
    process.start()
    process.join()
    with results.claim(KEY) as claim:
        assert claim.attempt == 1
        results.put(claim, b"4")
    ledger = results.count([KEY])
    assert (ledger.n_begun, ledger.n_abandoned, ledger.n_repeated) == (2, 1, 0)


def test_another_process_with_the_number_of_one_that_is_gone_is_not_taken_for_it(results):
    with results.claim(KEY):
        pretend(results, started="1")
        with Results(results.root).claim(KEY) as claim:
            assert claim.attempt == 1


@pytest.mark.parametrize("content", [None, b""], ids=["of another machine", "without content"])
def test_a_silent_claim_is_taken_over_after_the_lease(results, monkeypatch, content):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    watcher = Results(results.root, lease_seconds=60)

    def is_taken_over():
        with watcher.claim(KEY) as claim:
            return claim is not None

    with results.claim(KEY):
        if content is None:
            pretend(results, machine="another")
        else:
            claim_file(results).write_bytes(content)
        assert not is_taken_over()
        clock[0] += 59
        assert not is_taken_over()
        os.utime(claim_file(results))  # it lives: the lease begins anew
        assert not is_taken_over()
        clock[0] += 59
        assert not is_taken_over()
        clock[0] += 2
        assert is_taken_over()


def test_a_claim_is_kept_alive_while_its_process_computes(results):
    quick = Results(results.root, lease_seconds=0.06)
    with quick.claim(KEY):
        path = claim_file(results)
        first, ended = path.stat().st_mtime_ns, threading.Event()
        for _ in range(500):
            if path.stat().st_mtime_ns != first:
                break
            ended.wait(0.01)
        else:
            pytest.fail("the claim was not touched")


def test_two_that_finish_one_unit_leave_one_result_and_the_ledger_counts_it(results):
    slow = Results(results.root)
    with slow.claim(KEY) as first:
        pretend(results, started="1")
        with results.claim(KEY) as second:
            assert results.put(second, b"4")
        assert not slow.put(first, b"4")
    assert results.read(KEY) == b"4"
    ledger = results.count([KEY])
    assert (ledger.n_begun, ledger.n_recorded, ledger.n_repeated, ledger.n_abandoned) == (
        *(2, 1, 1, 0),
    )


def test_a_process_that_fails_gives_its_claim_up(results):
    with pytest.raises(ZeroDivisionError), results.claim(KEY):
        1 / 0  # noqa: B018
    with results.claim(KEY) as claim:
        assert claim.attempt == 1


def test_the_ledger_counts_only_units_that_are_asked_for(results):
    for text in (b"a unit", b"another"):
        with results.claim(digest_bytes(text)) as claim:
            results.put(claim, b"")
    assert results.count([KEY]).n_begun == 1
    assert results.count([]).n_begun == 0
