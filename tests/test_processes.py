"""How engines end with their processes: a clean exit in the midst of work, and forked children."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.checkpoints import build_xlm_roberta

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_xlm_roberta(tmp_path_factory.mktemp("processes") / "checkpoint")


# In bfloat16 threads take pairs of their own, in float32 they share products.
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def run_script(
    code: str, folder: Path, dtype: str = "float32", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code after an engine has been made and used, and return how the process ended."""
    begin = f"""
    import asyncio, os, sys, threading, time
    from bge_rerank_adapters import ClosedError, Reranker, WorkerDiedError
    engine = Reranker({str(folder)!r}, device="cpu", dtype={dtype!r})
    engine.score("query", ["text"])
    engine.score("query", ["text", "words"])
    LONG = [f"{{i}} " + "river stone tiger " * 100 for i in range(600)]
    ends = []
    def ask():
        try:
            engine.rerank("query", LONG)
        except Exception as error:
            ends.append(error)
    def ask_in_thread():
        threading.Thread(target=ask, daemon=True).start()
    def wait_until_busy():
        packs = engine.stats().packs
        while engine.stats().packs < packs + 3:
            time.sleep(0.001)
    """
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(begin) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        # More than one, so that torch has threads of its own, which a fork leaves behind.
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
    )


def assert_clean(done: subprocess.CompletedProcess[str], *, out: str = "") -> None:
    assert (done.returncode, done.stdout, done.stderr) == (0, out, "")


@each_dtype
def test_a_program_that_ends_while_threads_and_tasks_wait_ends_cleanly(folder, dtype):
    code = """
    async def leave():
        leave.tasks = [asyncio.create_task(engine.arerank("query", LONG)) for _ in range(4)]
        await asyncio.to_thread(wait_until_busy)
    ask_in_thread()
    asyncio.run(leave())
    wait_until_busy()
    """
    assert_clean(run_script(code, folder, dtype))


def test_a_program_that_ends_while_a_dropped_engine_is_freed_waits_for_that(folder):
    code = """
    begun = threading.Event()
    class Slow:
        def __del__(self):
            print("begun", flush=True)
            begun.set()
            time.sleep(1)
            print("freed", flush=True)
    engine._core.workers[0].model.slow = Slow()
    del engine
    begun.wait(60)
    """
    assert_clean(run_script(code, folder), out="begun\nfreed\n")


@each_dtype
def test_a_thread_of_the_program_is_served_to_its_end(folder, dtype):
    code = """
    import concurrent.futures.thread as pools
    def ask_late():
        while not pools._shutdown:  # until the main thread has ended
            time.sleep(0.01)
        print(len(engine.rerank("query", LONG[:100])))
        try:
            asyncio.run(engine.arerank("query", LONG[:5]))
        except ClosedError:
            print("closed")
    threading.Thread(target=ask_late).start()
    """
    # Once the main thread has ended, Python takes no new work for thread pools.
    assert_clean(run_script(code, folder, dtype), out="100\nclosed\n")


@each_dtype
@pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")
def test_a_child_forked_while_all_locks_are_held_ends_cleanly_and_loads_its_own(folder, dtype):
    code = """
    import gc, warnings
    from bge_rerank_adapters.engine.models.cpu import threads
    from langchain_core.documents import Document
    from bge_rerank_adapters.langchain import BGEDocumentCompressor
    warnings.simplefilter("ignore", DeprecationWarning)
    compressor = BGEDocumentCompressor(model=engine.settings.model, device="cpu", dtype="float32")
    documents = [Document(page_content=text) for text in LONG[:20]]
    logits, dtype = engine.logits("query", LONG[:20]), engine.dtype
    compressor.compress_documents(documents, "query")
    ask_in_thread()
    wait_until_busy()
    entered, over = threading.Event(), threading.Event()
    def hold():
        with engine._core._backlog.changed, engine._core.tally._lock:
            with engine._runner._short._shutdown_lock, engine._runner._long._shutdown_lock:
                with threads._starting:
                    entered.set()
                    over.wait(60)
    threading.Thread(target=hold, daemon=True).start()
    entered.wait(60)
    pid = os.fork()
    if pid:
        over.set()
        deadline = time.monotonic() + 100
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.01)
        if not ended[0]:
            os.kill(pid, 9)
        print("child", "hung" if not ended[0] else ended[1])
    else:
        for ask in (
            lambda: engine.score("query", ["text"]),
            lambda: asyncio.run(engine.arerank_many([("query", ["text"])])),
        ):
            try:
                ask()
                print("scored")
            except WorkerDiedError:
                print("told")
        assert engine.closed and engine.stats().pairs == 0
        engine.close()
        del engine
        gc.collect()
        with Reranker(compressor.model, device="cpu", dtype=dtype) as own:
            pairs = zip(own.logits("query", LONG[:20]), logits, strict=True)
            assert max(abs(a - b) for a, b in pairs) < 1e-5
        print(len(compressor.compress_documents(documents, "query")))
    sys.stdout.flush()
    """
    assert_clean(run_script(code, folder, dtype), out="told\ntold\n3\nchild 0\n")


@pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")
@pytest.mark.parametrize("parallelism", ["true", "1"])
def test_a_child_forked_where_tokenizers_are_told_to_use_threads_scores(folder, parallelism):
    """Those of the parent, which a batch would wait for without end."""
    code = """
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    logits = engine.logits("query", LONG[:20])
    pid = os.fork()
    if pid:
        deadline = time.monotonic() + 100
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.01)
        if not ended[0]:
            os.kill(pid, 9)
        print("child", "hung" if not ended[0] else ended[1])
        sys.stdout.flush()
    else:
        settings = {"device": "cpu", "dtype": "float32"}
        with Reranker(engine.settings.model, **settings) as own:
            pairs = zip(own.logits("query", LONG[:20]), logits, strict=True)
            assert max(abs(a - b) for a, b in pairs) < 1e-5
        with Reranker(engine.settings.model, **settings, long_documents="window") as own:
            assert len(own.score("query", [LONG[0] * 3, LONG[1] * 3])) == 2
    """
    done = run_script(code, folder, TOKENIZERS_PARALLELISM=parallelism)
    assert_clean(done, out="child 0\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are for POSIX")
def test_an_interrupt_ends_the_callers_wait_and_the_engine_goes_on(folder):
    code = """
    import signal
    def interrupt():
        wait_until_busy()
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        engine.rerank("query", LONG)
    except KeyboardInterrupt:
        print("interrupted", engine.stats().queued_pairs)
    print(len(engine.rerank("query", LONG[:5], timeout_s=60)))
    """
    assert_clean(run_script(code, folder), out="interrupted 0\n5\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are for POSIX")
def test_a_process_that_is_terminated_at_work_is_gone_at_once(folder):
    code = """
    import signal
    ask_in_thread()
    wait_until_busy()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    """
    done = run_script(code, folder)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are for POSIX")
def test_a_process_whose_event_loop_is_interrupted_ends_cleanly(folder):
    code = """
    import signal
    async def ask_many():
        calls = [asyncio.create_task(engine.arerank("query", LONG)) for _ in range(4)]
        await asyncio.to_thread(wait_until_busy)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.gather(*calls)
    try:
        asyncio.run(ask_many())
    except KeyboardInterrupt:
        print("interrupted")
    while engine.stats().queued_pairs:
        time.sleep(0.01)
    print(len(engine.rerank("query", LONG[:5], timeout_s=60)))
    """
    assert_clean(run_script(code, folder), out="interrupted\n5\n")
