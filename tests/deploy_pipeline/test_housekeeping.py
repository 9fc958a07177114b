"""What housekeeping leaves of a store that several machines share."""

import os
import time

from deploy_pipeline.archive import ArchiveStore
from deploy_pipeline.builders.local import LocalRuntime
from deploy_pipeline.housekeeping import Housekeeping
from deploy_pipeline.logs import LogStore
from deploy_pipeline.orders import Orders
from deploy_pipeline.releases import Releases
from deploy_pipeline.routing import Routes


class SharedFolder(ArchiveStore):
    is_shared = True


async def test_a_machine_leaves_the_archives_of_releases_that_another_one_keeps(redis, local, tmp_path):
    done = await local.deploy({"index.html": "kept"})
    failed = await local.deploy({"main.py": "raise SystemExit(1)"})
    archives = SharedFolder(local.config.archives_dir)
    here = tmp_path / "elsewhere"
    here.mkdir()
    releases = Releases(LocalRuntime(here), Routes(redis), Orders(redis), LogStore(redis), archives, here)
    housekeeping = Housekeeping(local.queue, releases, archives, apps_dir=here, drain_s=1)
    long_ago = time.time() - 2 * 3600
    for path in archives.folder.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert await archives.stored_before(3600) == {done.archive_sha256, failed.archive_sha256}
    await housekeeping.round()
    assert await archives.stored_before(-60) == {done.archive_sha256}
