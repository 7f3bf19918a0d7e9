//go:build unix

package main

import (
	"os/exec"
	"syscall"
)

// ownGroup keeps Ctrl-C on the terminal from a child: its parent tells it when to end.
func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
