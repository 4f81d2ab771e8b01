"""Starts programs quickly: libraries are loaded once here, and each order is carried out by a child that is forked.

Orders come as lines of JSON on standard input, answers go as lines to standard output. A child is a process like any other: it
has its own files, takes signals, and can be killed. An order may name a moment: a function, its how-manieth call, after how many
calls made in it, and what is to happen then; so a stage is met at any point of it, on a fast machine and on a slow one.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytorch_lightning  # noqa: F401
import torch
import transformers  # noqa: F401
from peft import LoraConfig  # noqa: F401
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

import dmt.cli.consolidate
import dmt.cli.main
import dmt.cli.memory
import dmt.tasks

PROGRAMS = {"distill": dmt.cli.main.distill_main, "dmt": dmt.cli.main.main}


def owner(path):
    """What holds the attribute that `module:name.name` names, and its name."""
    module, _, names = path.partition(":")
    *outer, last = names.split(".")
    held = import_module(module)
    for name in outer:
        held = getattr(held, name)
    return held, last


def fill(folder):
    """Leave no byte of a disk free."""
    with open(f"{folder}/filler", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 64, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


def act(what, about):
    if what in ("SIGKILL", "SIGTERM", "SIGINT"):
        print(f"{what} now", file=sys.stderr, flush=True)
        os.kill(os.getpid(), getattr(signal, what))
    elif what == "fill":
        fill(about)
    elif what == "readonly":
        subprocess.run(
            ["mount", "--bind", about, about], check=True
        )  # what is open already stays open, as it would
        subprocess.run(["mount", "-o", "remount,bind,ro", about], check=True)
    elif what == "take away":
        time.sleep(0.5)  # TensorBoard's thread writes down what it was given
        os.rename(about, f"{about}.taken")  # at once
        shutil.rmtree(f"{about}.taken", ignore_errors=True)
    elif what == "wait":  # until the test says go
        open(f"{about}.there", "w").close()
        while not os.path.exists(about):
            time.sleep(0.01)
    elif what == "poison":
        poison(about)
    else:
        raise ValueError(what)


def poison(name):
    """Spoil one tensor of whatever module learns: `gradient` or `output` of the layer after the colon."""
    raise NotImplementedError(name)


def at_moment(moment):
    """Make `do` happen in the `nth` call of `in`, after `after` more calls, or when it returns if that is sooner."""
    held, name = owner(moment["in"])
    plain = getattr(held, name)
    state = {"calls": 0, "left": moment.get("after", 0), "done": False}

    def go():
        if not state["done"]:
            state["done"] = True
            sys.setprofile(None)
            act(moment["do"], moment.get("about"))

    def watch(frame, event, given):
        state["left"] -= 1
        if state["left"] < 0:
            go()

    def wrapped(*given, **named):
        state["calls"] += 1
        if state["calls"] != moment.get("nth", 1) or state["done"]:
            return plain(*given, **named)
        if not state["left"]:
            go()
        else:
            sys.setprofile(watch)
        try:
            return plain(*given, **named)
        finally:
            sys.setprofile(None)
            go()

    setattr(held, name, wrapped)


def count(paths, file):
    """Write into `file` how many calls are made in the first call of each of these functions, and how often each is called."""
    found = {path: [0, 0] for path in paths}
    inside = []

    def watch(frame, event, given):
        for path in inside:
            found[path][0] += 1

    def wrap(path):
        held, name = owner(path)
        plain = getattr(held, name)

        def wrapped(*given, **named):
            found[path][1] += 1
            if found[path][1] > 1:
                return plain(*given, **named)
            inside.append(path)
            sys.setprofile(watch)
            try:
                return plain(*given, **named)
            finally:
                inside.remove(path)
                sys.setprofile(watch if inside else None)
                with open(file, "w") as out:
                    json.dump(found, out)

        setattr(held, name, wrapped)

    for path in paths:
        wrap(path)


def give_up_powers():
    """Obey the permissions of files as any user does: root that has no capability, whom its own libraries still belong to."""
    version_3, whoever_asks = 0x20080522, 0
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset((ctypes.c_uint32 * 2)(version_3, whoever_asks), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def carry_out(order):
    """What a child does; its exit code."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order['log']}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.chdir(order["cwd"])
    for path, value in order.get("set", {}).items():
        held, name = owner(path)
        setattr(held, name, value)
    if "limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    for prepare in order.get("prepare", []):
        import_module("patches").__dict__[prepare]()
    if order.get("powerless"):
        give_up_powers()
    if "count" in order:
        count(*order["count"])
    for moment in order.get("moments", []):
        at_moment(moment)
    return PROGRAMS[order["program"]](order["words"])


def main():
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
            continue
        child = os.fork()
        if child:
            print(json.dumps(child), flush=True)
            continue
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 70
        try:
            code = carry_out(order)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.setprofile(None)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    main()
