"""Kill a process that edits and journals, at random moments, and look at what it leaves behind each time.

    python kill_moments.py KILLS SEED FOLDER OUT.json

Every child is a fork of this process, which has the model loaded, and does what a run does: it opens the ledger, takes
the model to the ledger's head, and makes the edits that are left. After each kill a reader opens the ledger, and a
fresh model taken to its head must be bit for bit the one of an undisturbed run after as many edits.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conftest import GOLDEN, PARAMETER, load

from kdpo_editor import EditLedger, KDPOHyperParams

MODEL, TOK = load("llama")
CASES = json.loads((GOLDEN / "golden-llama.json").read_text("utf-8"))["cases"]
EDITS = 6
REQUESTS = list({c["prompt"]: {"prompt": c["prompt"], "target_new": c["target_new"]} for c in CASES}.values())[:EDITS]
HPARAMS = KDPOHyperParams(
    model_name="llama-mini", layers=[4], rewrite_module_tmp="model.layers.{}.mlp.down_proj", lr=1e-3, cycles=1
)


def run(folder: Path, model: Any) -> None:
    with EditLedger(folder, write=True) as ledger:
        ledger.restore(model)
        for request in REQUESTS[len(ledger.branch) :]:
            ledger.edit(model, TOK, [request], HPARAMS)


def killed(folder: Path, edits: int, delay: float) -> bool:
    """Start a run and kill it ``delay`` seconds after ``edits`` more are journaled; whether it was still going on."""
    wanted = lines(folder) + edits
    child = os.fork()
    if child == 0:
        try:
            run(folder, MODEL)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    while lines(folder) < wanted and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the run failed")
    return os.WIFSIGNALED(status)


def lines(folder: Path) -> int:
    """Lines of the journal that end."""
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def main() -> None:
    kills, seed, root, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    rng = random.Random(seed)
    others = {name: tensor.clone() for name, tensor in MODEL.state_dict().items() if name != PARAMETER}
    undisturbed = copy.deepcopy(MODEL)
    states = [undisturbed.get_parameter(PARAMETER).detach().clone()]
    start = time.perf_counter()
    with EditLedger(root / "undisturbed", write=True) as ledger:
        for request in REQUESTS:
            ledger.edit(undisturbed, TOK, [request], HPARAMS)
            states.append(undisturbed.get_parameter(PARAMETER).detach().clone())
    whole = time.perf_counter() - start

    found: dict[str, Any] = {"kills": 0, "runs": 0, "seconds_undisturbed": whole, "at": [0] * (EDITS + 1)}
    found |= {"cut_lines": 0, "unfinished_files": 0, "wrong": [], "lost": []}
    folder, before = root / "0", 0
    EditLedger(folder, write=True).close()
    while found["kills"] < kills:
        was_killed = killed(folder, rng.randrange(3), rng.uniform(0, whole / EDITS))
        found["kills"] += was_killed
        reader = EditLedger(folder)
        fresh = copy.deepcopy(MODEL)
        reader.restore(fresh)
        done = len(reader.branch)
        right = torch.equal(fresh.get_parameter(PARAMETER), states[done])
        right &= all(torch.equal(t, others[n]) for n, t in fresh.state_dict().items() if n != PARAMETER)
        if not right:
            found["wrong"].append(found["kills"])
        if done < before:
            found["lost"].append(found["kills"])
        before = done
        found["at"][done] += was_killed
        journal = folder / "journal.jsonl"
        found["cut_lines"] += journal.exists() and journal.stat().st_size > reader._journal.end
        found["unfinished_files"] += len(list(folder.glob("*.part")))
        if done == EDITS:
            found["runs"] += 1
            folder, before = root / str(found["runs"]), 0
            EditLedger(folder, write=True).close()
    while len(EditLedger(folder).branch) < EDITS:
        run(folder, copy.deepcopy(MODEL))
    fresh = copy.deepcopy(MODEL)
    EditLedger(folder).restore(fresh)
    found["end_is_the_same"] = torch.equal(fresh.get_parameter(PARAMETER), states[-1])
    out.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
