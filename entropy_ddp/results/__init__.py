"""What a run found: its schema, and the directory it is written to."""

from entropy_ddp.results.folder import (
    RUN_FILE,
    UNFINISHED,
    discard_unfinished,
    nothing_left,
    prepare_folder,
    write_results,
)
from entropy_ddp.results.reading import read_results
from entropy_ddp.results.schema import (
    SCHEMA_VERSION,
    AttributionResult,
    AuditRow,
    BatchFacts,
    CurvatureResult,
    GradientDotResult,
    LinearResult,
    Probed,
    Results,
    Rows,
    RunFacts,
    Status,
    TruthResult,
    UpdateResult,
    Verdict,
)

__all__ = [
    "RUN_FILE",
    "SCHEMA_VERSION",
    "UNFINISHED",
    "AttributionResult",
    "AuditRow",
    "BatchFacts",
    "CurvatureResult",
    "GradientDotResult",
    "LinearResult",
    "Probed",
    "Results",
    "Rows",
    "RunFacts",
    "Status",
    "TruthResult",
    "UpdateResult",
    "Verdict",
    "discard_unfinished",
    "nothing_left",
    "prepare_folder",
    "read_results",
    "write_results",
]
