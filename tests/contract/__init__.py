"""What every implementation of ``pgofflined.ports.Hypervisor`` has to do, Xen first of all.

``make test`` runs these against the simulated host.  Inside a dom0 they run against Xen:

    PGOFFLINED_BACKEND=xen PGOFFLINED_PV_DOMID=1 PGOFFLINED_PVH_DOMID=2 PGOFFLINED_DEAF_DOMID=3 \
        python3 -m pytest /opt/pgofflined-tests/tests/contract

``PV`` and ``PVH`` are idle Linux guests of 64 MiB or more, ``DEAF`` a PV guest that does not read
control/shutdown.  A host without PVH leaves out ``test_pvh.py``.  dom0 needs two pCPUs or more.
``test_retirement.py`` really takes a frame out and puts it back; on hypervisors that keep looking
for a page to scrub after that (all so far) an idle CPU spins until the next boot: run it last.
"""
