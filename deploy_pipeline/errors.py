"""What can go wrong on the way from an archive to a running application; the messages are for the application's owner.

PipelineError
  LostClaim           somebody else has the job
  ForbiddenChange     the table of states has no such change: a bug in the caller
  DeployFailed        it ends the deployment as failed, with this reason
    ArchiveRefused      the archive is damaged, too large, or tries something
    ArchivesUnavailable the store of archives cannot be reached
    NotDeployable       nothing in it says how to run it, or not on this runtime
    BuildFailed         a build step failed, or took too long
    StartFailed         it was built, but does not answer
  EngineUnavailable   the container engine cannot be reached: to be tried again, not the owner's fault
"""


class PipelineError(Exception):
    """Anything this package raises on purpose."""


class LostClaim(PipelineError):
    """The claim's lease ran out and somebody else has the job, or it was ended: stop, and write nothing more."""


class ForbiddenChange(PipelineError):
    """The deployment's state does not allow this change."""


class DeployFailed(PipelineError):
    """The deployment fails for this reason."""


class ArchiveRefused(DeployFailed):
    """The archive is not what a workspace may send."""


class ArchivesUnavailable(DeployFailed):
    """The store of archives cannot be reached; deploying again may work."""


class NotDeployable(DeployFailed):
    """Nothing in the files says how to run them, or this runtime cannot."""


class BuildFailed(DeployFailed):
    """A build step failed; its output is in the build log."""


class StartFailed(DeployFailed):
    """The application does not answer; its output is in the release's log."""


class EngineUnavailable(PipelineError):
    """The container engine cannot be reached."""
