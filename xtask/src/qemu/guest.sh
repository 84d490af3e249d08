# What every guest does before its first program. The lines before these set the variables.
B=$results/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
$B mkdir -p /dev/pts /dev/shm
$B mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
$B mount -t tmpfs shm /dev/shm
$B mount -t bpf bpf /sys/fs/bpf
$B mount -t cgroup2 cgroup /sys/fs/cgroup
$B mkdir -p /lib/modules /run/lock /run/netns
$B mount -o bind "$modules" /lib/modules
# The kernel loads modules by the name of this file.
$B ln -s "$B" /run/modprobe
$B echo /run/modprobe > /proc/sys/kernel/modprobe
# There is no udev to load the drivers of devices that were there from the start.
for alias in $($B cat /sys/bus/pci/devices/*/modalias /sys/bus/virtio/devices/*/modalias 2>/dev/null); do
    /run/modprobe -q "$alias"
done
# Nor to make the node of a device whose driver is loaded when the node is opened.
/run/modprobe -q tun
# Out of memory is a panic, which the console shows.
$B echo 1 > /proc/sys/vm/panic_on_oom
$B hostname affinity-guest
$B ip link set lo up
$B echo "booted in $($B cut -d ' ' -f 1 /proc/uptime) s" > "$results/booted"

# A number, a directory, and a command.
job() {
    number=$1
    cd "$2" || finish
    shift 2
    "$@" < /dev/null > "$results/output.$number" 2>&1
    $B echo $? > "$results/status.$number"
}

finish() {
    $B echo finished > "$results/finished"
    $B sync
    $B poweroff -f
}

