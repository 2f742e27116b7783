"""Who finds what: `thalweg.doctor.examine`, torch's anomaly mode, the weight-gradient ratio, on one hospital.

    python benchmarks/doctor.py [--seeds 5] [--json doctor.json]

Every patient and every healthy twin is seen by all three instruments, in the same process and in turn.
"right" counts seeds with the right code at the right module (the peers name none: any alarm counts for them);
the last column is the time of `examine` over that of one forward and backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from thalweg.doctor import examine
from thalweg.doctor.hospital import HEALTHY, SICK, Case
from thalweg.doctor.patient import Patient, total
from thalweg.table import align, short

# the worry limits that the doctor uses for activations, given to the usual instrument
RATIO = (1e-3, 1e3)


def anomaly(case: Case) -> bool:
    """Whether torch's anomaly mode raises."""
    patient = Patient(case.model, case.losses, None, 0)
    try:
        with patient.visit(), torch.autograd.set_detect_anomaly(True):
            patient.gradients(total(patient.terms()))
    except RuntimeError:
        return True
    return False


def weight_ratio(case: Case) -> float | None:
    """Norm of the first weight's gradient over that of the last of the same shape; None without two."""
    patient = Patient(case.model, case.losses, None, 0)
    with patient.visit():
        gradients = patient.gradients(total(patient.terms()))
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for parameter, gradient in zip(patient.parameters, gradients):
        if gradient is not None and parameter.ndim > 1:
            by_shape.setdefault(parameter.shape, []).append(gradient.double())
    longest = max(by_shape.values(), key=len, default=[])
    return (longest[0].norm() / longest[-1].norm()).item() if len(longest) > 3 else None


def milliseconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def slowdown(case: Case, repeats: int = 5) -> float:
    """Median time of `examine` over the median time of one forward and backward, measured in turn."""
    patient = Patient(case.model, case.losses, None, 0)

    def once() -> None:
        with patient.visit():
            patient.gradients(total(patient.terms()))

    pairs = [
        (milliseconds(once), milliseconds(lambda: examine(case.model, case.losses, optimizer=case.optimizer)))
        for _ in range(repeats + 1)
    ][1:]
    return statistics.median(b for _, b in pairs) / statistics.median(a for a, _ in pairs)


def working_size() -> Case:
    """A transformer whose arithmetic outweighs Python: six blocks of width 256, 16 sequences of 64."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, norm_first=True)
    model = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    x = torch.randn(16, 64, 256)
    return Case(model, lambda: model(x).square().mean(), torch.optim.Adam(model.parameters()))


def row(name: str, build: Callable[[int], Case], seeds: int) -> dict[str, Any]:
    """One line of the confusion table."""
    right, alarms, outside, codes, worst = 0, 0, 0, set(), 0
    ratios = []
    for seed in range(seeds):
        case = build(seed)
        report = examine(case.model, case.losses, optimizer=case.optimizer)
        serious = [f for f in report.findings if f.severity >= 2]
        codes |= {f.code for f in serious}
        worst = max(worst, report.worst)
        if case.code:
            right += any(f.code == case.code and f.where == case.where for f in serious)
        else:
            right += not serious
        alarms += anomaly(build(seed))
        ratio = weight_ratio(build(seed))
        if ratio is not None:
            ratios.append(ratio)
            outside += not RATIO[0] <= ratio <= RATIO[1]
    case = build(0)
    return {
        "case": name,
        "code": case.code,
        "where": case.where,
        "seeds": seeds,
        "right": right,
        "found": sorted(codes),
        "severity": worst,
        "anomaly_mode": alarms,
        "weight_ratio_alarms": outside if ratios else None,
        "weight_ratio": statistics.median(ratios) if ratios else None,
        "slowdown": slowdown(case),
    }


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", default=None, help="write the rows here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [row(name, build, options.seeds) for name, build in (SICK | HEALTHY).items()]
    columns = [
        "case",
        "code",
        "right",
        "found",
        "severity",
        "anomaly mode",
        "weight ratio",
        "alarms",
        "x time",
    ]
    cells = [
        [
            each["case"],
            each["code"] or "healthy",
            f"{each['right']}/{each['seeds']}",
            " ".join(each["found"]) or "-",
            str(each["severity"]),
            f"{each['anomaly_mode']}/{each['seeds']}",
            short(each["weight_ratio"]),
            short(each["weight_ratio_alarms"]),
            short(each["slowdown"]),
        ]
        for each in rows
    ]
    print(align(columns, cells))
    sick = [each for each in rows if each["code"]]
    healthy = [each for each in rows if not each["code"]]
    summary = {
        "sick": len(sick),
        "named in every seed": sum(each["right"] == each["seeds"] for each in sick),
        "anomaly mode alarms on": sum(each["anomaly_mode"] == each["seeds"] for each in sick),
        "weight ratio alarms on": sum((each["weight_ratio_alarms"] or 0) == each["seeds"] for each in sick),
        "healthy": len(healthy),
        "healthy with a serious finding": sum(each["right"] < each["seeds"] for each in healthy),
        "slowdown at working size": slowdown(working_size(), repeats=3),
        "median slowdown": statistics.median(each["slowdown"] for each in rows),
    }
    print("\n" + "\n".join(f"{name}: {short(float(value))}" for name, value in summary.items()))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"summary": summary, "rows": rows, "torch": torch.__version__}, file, indent=1)


if __name__ == "__main__":
    main()
