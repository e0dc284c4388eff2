"""`-m hf_ptune.train` on an engine that is made for accelerators; `launch.py` starts it."""

import runpy

import on_cpu

if __name__ == "__main__":
    on_cpu.prepare()
    runpy.run_module("hf_ptune.train", run_name="__main__", alter_sys=True)
