"""What a run found: its schema, and the directory it is written to."""

from entropy_ddp.results.folder import (
    UNFINISHED,
    discard_unfinished,
    prepare_folder,
    write_results,
)
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
    "prepare_folder",
    "write_results",
]
