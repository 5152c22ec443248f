"""Random 768x768 matrices: does the answer reach the Cramér-Rao bound, where the paper's method does not?

Expected: `auto` within 0.3 of the bound or of the float32 storage floor, whichever is higher, at every rank.
"""

from problems import error, random_problem

from detune import recover_matrix
from detune.methods import Spectral

CASES = [
    # rank, n, decay, relative size of the deltas
    (16, 3, 7.0, 1.0),
    (32, 3, 7.0, 1.0),
    (16, 5, 7.0, 1.0),
    (64, 3, 7.0, 1.0),
    (64, 3, 0.0, 1.0),
    (64, 3, 0.0, 0.03),
    (64, 5, 0.0, 0.03),
]


def main() -> None:
    print("768x768, float32 merges; W-Error, lower is better; spectral: 300 iterations, told the rank")
    print(
        f"{'r':>3} {'n':>2} {'decay':>5} {'size':>5} | {'mean':>6} {'spectral':>8} {'intersect':>9} {'auto':>7} ",
        end="",
    )
    print(f"| {'bound':>7} {'floor':>7} {'auto - max(bound, floor)':>24}")
    for rank, n, decay, size in CASES:
        problem = random_problem(768, 768, rank, n, decay=decay, relative_size=size)
        figures = {
            name: error(
                recover_matrix(problem.models, method, rank=rank if name == "spectral" else None).weight, problem
            )
            for name, method in {
                "mean": "mean",
                "spectral": Spectral(iterations=300),
                "intersect": "intersect",
                "auto": "auto",
            }.items()
        }
        target = max(problem.bound, problem.storage_floor)
        print(f"{rank:3} {n:2} {decay:5} {size:5} | ", end="")
        print(
            f"{figures['mean']:6.2f} {figures['spectral']:8.2f} {figures['intersect']:9.2f} {figures['auto']:7.2f} ",
            end="",
        )
        print(f"| {problem.bound:7.2f} {problem.storage_floor:7.2f} {figures['auto'] - target:+24.2f}")


if __name__ == "__main__":
    main()
