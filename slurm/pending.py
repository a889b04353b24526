"""Why a job is pending: Slurm's reasons (squeue(1), JOB REASON CODES) explained, with a remedy."""

from __future__ import annotations

_EXPLANATIONS = {
    "AssociationJobLimit": "the account's job limit is reached; it starts when other jobs end",
    "AssocGrp": "the account's share of the cluster is in use; it starts when other jobs of the account end",
    "AssocMax": "it requests more than the account may use at once: submit with fewer --nodes or a shorter --time",
    "BadConstraints": "no node satisfies the request: see --exclude, excluded nodes, `sbatch` of the site file",
    "BeginTime": "Slurm delays a requeued job; it starts without further action",
    "Dependency": "it depends on the end of the previous job",
    "DependencyNeverSatisfied": "the job that it depends on is gone: cancel it, then bifrost slurm resume",
    "InvalidAccount": "no such account, or not for this partition: use another --account",
    "InvalidQOS": "no such quality of service for the account: see `sbatch` of the site file",
    "JobArrayTaskLimit": "the elements of the array run one at a time",
    "JobHeldAdmin": "held by an administrator: contact them",
    "JobHeldUser": "held by a user: scontrol release JOBID",
    "JobHoldMaxRequeue": "held after too many requeues: check the log, then cancel and resume",
    "Licenses": "it waits for a licence",
    "MaxCpuPerAccount": "the account's core limit is reached; it starts when other jobs end",
    "NodeDown": "a node that it needs is down: see sinfo -R",
    "PartitionDown": "the partition is down: see sinfo for those that are up",
    "PartitionInactive": "the partition accepts no jobs now: see sinfo for those that do",
    "PartitionNodeLimit": "above the partition's node limit: cancel, then submit with fewer --nodes",
    "PartitionTimeLimit": "above the partition's time limit: cancel, then submit with a shorter --time",
    "Priority": "jobs of higher priority are first; squeue --start estimates when it starts",
    "QOSGrp": "the quality of service is fully used; it starts when its other jobs end",
    "QOSMax": "it requests more than the quality of service allows: submit with fewer --nodes or a shorter --time",
    "QOSResourceLimit": "the quality of service is fully used; it starts when its other jobs end",
    "ReqNodeNotAvail": "nodes that it needs are reserved, down or drained: see sinfo -R",
    "Reservation": "it waits for its reservation to begin",
    "Resources": "its nodes are in use; squeue --start estimates when it starts",
    "launch_failed_requeued_held": "the launch failed: scontrol release JOBID, or exclude its node",
}


def explained(reason: str) -> str:
    """Slurm's `reason` with its explanation, if known, by the longest matching prefix: Slurm appends details
    (`ReqNodeNotAvail, UnavailableNodes:node2`, `QOSMaxNodePerUserLimit`)."""
    known = max((name for name in _EXPLANATIONS if reason.startswith(name)), key=len, default=None)
    return f"{reason}: {_EXPLANATIONS[known]}" if known else reason
