"""Boot test kernels and run commands in them; standard library only, so that any Python 3.11 will do.

From the command line to the verdict:

* ``cli`` parses and prints; ``kernels`` lists what can be booted; ``cache`` says where a built kernel lies.
* ``recipes`` builds what is missing, with Debian packages got through ``packages``.
* ``job`` lays out one run: a directory that host and guest both see, with the command and the channels back.
* ``vehicles`` turn a built kernel and a job into a process: User Mode Linux or QEMU.
* ``watch`` relays the command's output while the guest lives and decides how the run ended.

The guest's side is ``guest-init``, one shell script for all vehicles.
"""
