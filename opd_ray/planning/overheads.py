"""Memory that processes take before any model, by measurement.

Private bytes (RssAnon of /proc/PID/status) at the embedded scale, whose models and batches take next to nothing, read
by benchmarks/bench_plan.py (kept in benchmarks/results/plan.json): Python 3.11, torch 2.13, vLLM 0.32, DeepSpeed 0.19,
transformers 5.19 on CPU. Pages of libraries are shared by the processes of a node and counted once.
What a CUDA build takes beside has not been measured.
"""

from __future__ import annotations

MIB = 2**20

ROLLOUT_PROCESS = 1450 * MIB
LEARNER_PROCESS = 480 * MIB
TEACHER_PROCESS = 300 * MIB
DRIVER_AND_STORE = 170 * MIB
# Ray's own processes on a head node with its dashboard (1.0 GiB), and the mapped pages of libraries.
RAY_NODE = 1500 * MIB

# Assumed: host memory of a worker with CUDA loaded, and GPU memory of its context and library workspaces.
CUDA_PROCESS_HOST = 2048 * MIB
CUDA_CONTEXT = 600 * MIB
