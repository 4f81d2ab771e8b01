"""Start programs quickly: load the libraries once and fork a child for each order.

Orders arrive as JSON lines on standard input; answers are lines on standard output. A child is an
ordinary process: it has its own files, receives signals and can be killed. An order may hold
moments. A moment names a function, the number of the call, how many calls inside it to wait, and
what happens then, so a fault hits the same stage on a fast and on a slow machine.
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


def resolve_attribute(path):
    """Return the object that has the attribute `module:name.name`, and the attribute's name."""
    module, _, names = path.partition(":")
    *outer, last = names.split(".")
    holder = import_module(module)
    for name in outer:
        holder = getattr(holder, name)
    return holder, last


def fill_disk(folder):
    """Fill a disk to the last byte."""
    with open(f"{folder}/filler", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 64, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


def perform(action, target):
    """Send a signal to this process, or do `action` to the path `target`."""
    if action in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        print(f"{action} now", file=sys.stderr, flush=True)
        os.kill(os.getpid(), getattr(signal, action))
    elif action == "fill":
        fill_disk(target)
    elif action == "readonly":
        # Open files stay open, as they do when a disk is remounted.
        subprocess.run(["mount", "--bind", target, target], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
    elif action == "remove folder":
        time.sleep(0.5)  # TensorBoard's thread writes its queue
        os.rename(target, f"{target}.removed")  # atomically
        shutil.rmtree(f"{target}.removed", ignore_errors=True)
    elif action == "wait":  # until the test creates the file
        open(f"{target}.waiting", "w").close()
        while not os.path.exists(target):
            time.sleep(0.01)
    else:
        raise ValueError(action)


def schedule(moment):
    """Perform `do` in the `nth` call of `in`, after `after` more calls or when it returns."""
    holder, name = resolve_attribute(moment["in"])
    original = getattr(holder, name)
    state = {"calls": 0, "left": moment.get("after", 0), "done": False}

    def act_once():
        if not state["done"]:
            state["done"] = True
            sys.setprofile(None)
            perform(moment["do"], moment.get("target"))

    def watch(frame, event, args):
        state["left"] -= 1
        if state["left"] < 0:
            act_once()

    def wrapped(*args, **kwargs):
        state["calls"] += 1
        if state["calls"] != moment.get("nth", 1) or state["done"]:
            return original(*args, **kwargs)
        if not state["left"]:
            act_once()
        else:
            sys.setprofile(watch)
        try:
            return original(*args, **kwargs)
        finally:
            sys.setprofile(None)
            act_once()

    setattr(holder, name, wrapped)


def count(paths, file):
    """Count the calls of each function and the calls made inside its first one.

    Both numbers are written to `file` as JSON.
    """
    counts = {path: [0, 0] for path in paths}
    inside = []

    def watch(frame, event, args):
        for path in inside:
            counts[path][0] += 1

    def wrap(path):
        holder, name = resolve_attribute(path)
        original = getattr(holder, name)

        def wrapped(*args, **kwargs):
            counts[path][1] += 1
            if counts[path][1] > 1:
                return original(*args, **kwargs)
            inside.append(path)
            sys.setprofile(watch)
            try:
                return original(*args, **kwargs)
            finally:
                inside.remove(path)
                sys.setprofile(watch if inside else None)
                with open(file, "w") as out:
                    json.dump(counts, out)

        setattr(holder, name, wrapped)

    for path in paths:
        wrap(path)


def drop_capabilities():
    """Drop the capabilities of root, so that file permissions apply as to any user."""
    version_3, this_process = 0x20080522, 0
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset((ctypes.c_uint32 * 2)(version_3, this_process), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def run_order(order):
    """Carry out an order in the child; return its exit code."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order['log']}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.chdir(order["cwd"])
    for path, value in order.get("set", {}).items():
        holder, name = resolve_attribute(path)
        setattr(holder, name, value)
    if "limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    for prepare in order.get("prepare", []):
        import_module("patches").__dict__[prepare]()
    if order.get("unprivileged"):
        drop_capabilities()
    if "count" in order:
        count(*order["count"])
    for moment in order.get("moments", []):
        schedule(moment)
    return PROGRAMS[order["program"]](order["args"])


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
            code = run_order(order)
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
