package diskcheck

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	direct = unix.O_DIRECT
	dsync  = unix.O_DSYNC
)

func datasync(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// unsupported tells that a file system has no O_DIRECT from other errors.
func unsupported(err error) error {
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) {
		return errUnsupported
	}
	return err
}

// aligned gives n bytes where O_DIRECT wants them.
func aligned(n int) []byte {
	b := make([]byte, n+block)
	off := int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (block - 1)) //nolint:gosec // only looked at
	if off > 0 {
		off = block - off
	}
	return b[off : off+n : off+n]
}

// facts asks the kernel.
func facts(dir string) (Facts, error) {
	f := Facts{Dir: dir, FreeBytes: -1}
	real, err := filepath.EvalSymlinks(dir)
	if err == nil {
		real, err = filepath.Abs(real)
	}
	if err != nil {
		return f, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(real, &st); err != nil {
		return f, fmt.Errorf("look at the file system of %s: %w", dir, err)
	}
	f.FreeBytes = int64(st.Bavail) * int64(st.Bsize) //nolint:unconvert // their types differ between systems
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return f, nil //nolint:nilerr // it is not said
	}
	device := f.mounted(string(mounts), real)
	if device != "" {
		f.block("/sys", device)
	}
	return f, nil
}

// mounted finds the mount that path lies on (proc_pid_mountinfo(5)), and returns its device, "major:minor".
func (f *Facts) mounted(mounts, path string) (device string) {
	for line := range strings.Lines(mounts) {
		fields := strings.Fields(line)
		dash := slices.Index(fields, "-")
		if dash < 6 || len(fields) < dash+3 {
			continue
		}
		at := unescape(fields[4])
		below := at == "/" || path == at || strings.HasPrefix(path, at+"/")
		if !below || len(at) < len(f.Mount) {
			continue // of two at one place the later one is on top
		}
		f.Mount, f.Type, f.Source = at, fields[dash+1], unescape(fields[dash+2])
		f.Options = strings.Split(fields[5], ",")
		if len(fields) > dash+3 {
			for _, o := range strings.Split(fields[dash+3], ",") {
				if !slices.Contains(f.Options, o) {
					f.Options = append(f.Options, o)
				}
			}
		}
		device = fields[2]
	}
	return device
}

// unescape reads the octal escapes of mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// block reads what sysfs, which is mounted at sys, says of a block device.
func (f *Facts) block(sys, device string) {
	path, err := filepath.EvalSymlinks(filepath.Join(sys, "dev/block", device))
	if err != nil {
		// btrfs and its like have a number of their own: look by the name of the source.
		if path, err = filepath.EvalSymlinks(filepath.Join(sys, "class/block", filepath.Base(f.Source))); err != nil || f.Source == "" {
			return
		}
	}
	if _, err := os.Stat(filepath.Join(path, "partition")); err == nil {
		path = filepath.Dir(path)
	}
	f.Disk = filepath.Base(path)
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(path, name))
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	f.WriteCache = read("queue/write_cache")
	flag := func(name string) *bool {
		switch v := read(name); v {
		case "":
			return nil
		default:
			yes := v != "0"
			return &yes
		}
	}
	f.Rotational, f.FUA = flag("queue/rotational"), flag("queue/fua")
	f.Model = strings.TrimSpace(read("device/vendor") + " " + read("device/model"))
	if strings.HasPrefix(read("device/vendor"), "0x") { // a number of PCI
		f.Model = read("device/model")
	}
	f.Virtual = strings.Contains(path, "/virtio") || strings.HasPrefix(f.Disk, "xvd") || strings.Contains(path, "/vmbus") ||
		slices.ContainsFunc([]string{"QEMU", "VMware", "VBOX", "Virtual Disk", "Amazon Elastic Block Store", "PersistentDisk"}, func(s string) bool {
			return strings.Contains(f.Model, s)
		})
}
