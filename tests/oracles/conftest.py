"""Prints how closely each comparison agreed, below pytest's own summary."""

from __future__ import annotations

from importlib import metadata

import pytest

from tests.oracles.agreement import largest_differences

PACKAGES = ("liger-kernel", "scipy", "trl", "verl")


def pytest_report_header() -> str:
    installed = {
        package.metadata["Name"].lower().replace("_", "-"): package.version for package in metadata.distributions()
    }
    return "oracles: " + ", ".join(f"{name} {installed.get(name, 'not installed')}" for name in PACKAGES)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not largest_differences:
        return
    terminalreporter.section("largest differences, relative to the largest value")
    for (oracle, ours, dtype), (value, gradient) in sorted(largest_differences.items()):
        slope = "-" if gradient is None else f"{gradient:.1e}"
        terminalreporter.write_line(f"{oracle:62} {ours:26} {dtype:8} value {value:.1e}  gradient {slope}")
