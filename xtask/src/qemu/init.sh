#!/bin/busybox sh
# The first process of a guest: mounts the files of the machine that runs it, and hands over to the script of this run.
# The machine's files can be read; what the guest writes goes to its memory, and is gone with it.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t devtmpfs dev /dev
for module in $($B cat /modules/order); do
    $B insmod /modules/$module || echo "init: insmod $module failed"
done
word() { $B sed -n "s/.*affinity\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
share() { $B mkdir -p "$2" 2>/dev/null; $B mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2"; }

share root /lower ro,cache=loose || { echo "init: no root file system"; $B poweroff -f; }
$B mount -t tmpfs -o size=60% upper /upper
$B mkdir /upper/changes /upper/work
$B mount -t overlay -o lowerdir=/lower,upperdir=/upper/changes,workdir=/upper/work root /new ||
    { echo "init: no overlay"; $B poweroff -f; }
$B mount -t tmpfs tmp /new/tmp
$B mount -t tmpfs run /new/run
# Where these are below /tmp or /run, they have just been hidden.
share repository "/new$(word repository)" ro,cache=loose
share target "/new$(word target)" ro,cache=loose
share results "/new$(word results)" rw,cache=none || { echo "init: no results directory"; $B poweroff -f; }
results=$(word results)
$B umount /proc /dev
exec $B switch_root /new "$results/busybox" sh "$results/guest.sh"
