"""The one way to run a job: an open worker group in, a `RunRecord` out.

The order of what happens protects the evidence: what a result is made from is hashed before anything starts; a result
is hashed before it takes its place; its record follows at once, while the workers still live (ending them can fail);
pictures come last and are drawn from the record as it was read back.
"""

from distributed_unlearn.records import RunRecord
from distributed_unlearn.report.run_log import RunLog
from distributed_unlearn.rounds.events import RunEvents
from distributed_unlearn.rounds.folder import confirm_shared
from distributed_unlearn.rounds.preparation import PreparedRun, Session
from distributed_unlearn.rounds.training import train
from distributed_unlearn.rounds.unlearning import unlearn
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.group import WorkerGroup


def run_session(group: WorkerGroup, run: PreparedRun, events: RunEvents) -> RunRecord:
    """Run a prepared job; checkpoint and record are in its folder when this returns.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    workers = Workers(group)
    confirm_shared(workers, run.folder)
    with RunLog(run.folder) as log:
        workers.set_corpus(run.data.corpus)
        session = Session(run, workers, log, events)
        return unlearn(session) if run.job.train is None else train(session)
