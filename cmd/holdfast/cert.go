package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/internal/pki"
)

const (
	certDirDefault = "holdfast-pki"
	certHelp       = `The folder --dir holds the authority: whoever has its ca.key can make devices. It may be kept on another machine
than the gateway, which needs ca.crt, server.crt, server.key and crl.pem only.`
)

// authorityFlag declares --dir.
func authorityFlag(fs *flag.FlagSet) *string {
	return fs.String("dir", certDirDefault, "`DIR` of the authority")
}

// authorityAt opens a folder by its absolute path, which is what stands in configurations.
func authorityAt(dir string) (*pki.Authority, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	return pki.At(abs, nil), nil
}

// certError makes what pki says usage errors where they are, and adds the way out.
func certError(err error, dir string) error {
	switch {
	case errors.Is(err, pki.ErrName):
		return usageError{strings.TrimSuffix(err.Error(), ": "+pki.ErrName.Error())}
	case errors.Is(err, pki.ErrNoCA):
		return fmt.Errorf("%w: make one with holdfast cert init --dir %s, or say where it is with --dir", err, dir)
	case errors.Is(err, pki.ErrUnknown):
		return fmt.Errorf("%w: holdfast cert list shows what was", err)
	}
	return err
}

var certInitCommand = command{
	name: "cert init", args: "[--dir DIR] [--name SITE] [--host HOST …] [--force]",
	summary: "Make a certificate authority for this site, and the gateway's certificate",
	help: `For a site that has no authority of its own. It makes ca.crt (ten years), server.crt for the gateway (397 days: renew
it once a year), and crl.pem, the list of revoked certificates (as long as server.crt, and renewed with it), and shows
what to put into the configuration. Keys are ECDSA P-256.

--host is a name or an IP address under which devices reach the gateway, and may be repeated. Without it: this
machine's host name, localhost, 127.0.0.1 and ::1.

` + certHelp,
	run: certInit,
}

func certInit(_ context.Context, p *program, args []string) error {
	fs := p.flags()
	dir := authorityFlag(fs)
	name := fs.String("name", "", "name of the `SITE` (none: the host name)")
	var hosts []string
	fs.Func("host", "a `HOST` name or IP address of the gateway; may be repeated", func(s string) error {
		hosts = append(hosts, s)
		return nil
	})
	force := fs.Bool("force", false, "make a new one although there is one: all that it issued is worth nothing then")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	a, err := authorityAt(*dir)
	if err != nil {
		return err
	}
	if *name == "" {
		host, err := os.Hostname()
		if err != nil {
			return usagef("this machine has no host name: say --name SITE")
		}
		*name = host[:min(40, len(host))]
	}
	if len(hosts) == 0 {
		hosts = pki.DefaultHosts()
	}
	err = a.Init(pki.InitOptions{Site: *name, Hosts: hosts, Force: *force})
	if errors.Is(err, pki.ErrExists) {
		return fmt.Errorf("%w: holdfast cert rotate ca makes a new one beside it, holdfast cert rotate server a new certificate for the gateway; "+
			"--force begins anew, and every device needs a new certificate then", err)
	}
	if err != nil {
		return certError(err, *dir)
	}
	entries, err := a.List()
	if err != nil {
		return err
	}
	fmt.Fprintf(p.stdout, "certificate authority %s in %s\n\n", *name, a.Dir())
	rows := [][]string{{"FILE", "WHAT", "ENDS"}}
	for _, e := range entries {
		switch e.Kind {
		case pki.KindCA:
			rows = append(rows, []string{"ca.crt, ca.key", "the authority; keep ca.key to yourself", e.NotAfter.Format(time.DateOnly)})
		case pki.KindServer:
			rows = append(rows, []string{"server.crt, server.key", "the gateway, as " + strings.Join(hosts, ", "), e.NotAfter.Format(time.DateOnly)})
		}
	}
	rows = append(rows, []string{"crl.pem", "revoked certificates, none yet", time.Now().Add(pki.CRLLifetime).UTC().Format(time.DateOnly)})
	p.table(rows...)
	p.printListener(a)
	fmt.Fprintf(p.stdout, "\nNext: holdfast cert device ID%s for each device.\n", dirArg(*dir))
	return nil
}

// dirArg gives the flag that says dir, if it has to be said.
func dirArg(dir string) string {
	if dir == certDirDefault {
		return ""
	}
	return " --dir " + dir
}

// printListener shows what the gateway's configuration has to say.
func (p *program) printListener(a *pki.Authority) {
	fmt.Fprintf(p.stdout, `
In gateway.yaml, under listeners:

  - name: tls
    protocol: mqtts
    address: "0.0.0.0:8883"
    tls:
      cert: %q
      key: %q
      client_ca: %q
      require_client_cert: true
      crl: %q

The gateway's user has to be able to read these four.
`, a.Path("server.crt"), a.Path("server.key"), a.Path("ca.crt"), a.Path("crl.pem"))
}

var certDeviceCommand = command{
	name: "cert device", args: "ID [--days N] [--bundle FILE] [--dir DIR] [--force]",
	summary: "Make a certificate for a device", words: []string{"device"},
	help: `The certificate names the device, so the gateway lets it in under that client id once the device is registered:
holdfast device add ID --no-credential. --bundle also writes key, certificate and ca.crt into one PEM file, which some
devices want.

` + certHelp,
	run: certDevice,
}

func certDevice(_ context.Context, p *program, args []string) error {
	fs := p.flags()
	dir := authorityFlag(fs)
	days := fs.Int("days", pki.DeviceDays, "it is valid for `N` days")
	bundle := fs.String("bundle", "", "also write all into one new PEM `FILE`")
	force := fs.Bool("force", false, "make a new one although there is one")
	ids, err := p.parse(fs, args, 1, 1)
	if err != nil {
		return err
	}
	if *days < 1 || *days > pki.MaxDeviceDays {
		return usagef("--days is from 1 to %d", pki.MaxDeviceDays)
	}
	a, err := authorityAt(*dir)
	if err != nil {
		return err
	}
	if err := freeFile(*bundle); err != nil {
		return err
	}
	e, err := a.Device(ids[0], *days, *force)
	if errors.Is(err, pki.ErrExists) {
		return fmt.Errorf("%w: holdfast cert rotate device %s makes a new one", err, ids[0])
	}
	if err != nil {
		return certError(err, *dir)
	}
	return p.printDeviceCert(a, e, *bundle)
}

// freeFile refuses a file that is there, before anything is issued.
func freeFile(file string) error {
	if file == "" {
		return nil
	}
	if _, err := os.Lstat(file); err == nil {
		return usagef("--bundle: %s exists already, and may hold a key: name another file", file)
	}
	return nil
}

func (p *program) printDeviceCert(a *pki.Authority, e pki.Entry, bundle string) error {
	cert, key := a.DeviceFiles(e.Name)
	if bundle != "" {
		if err := a.Bundle(e.Name, bundle); err != nil {
			return err
		}
	}
	fmt.Fprintf(p.stdout, "certificate of device %s, serial %s, valid to %s\n\n", e.Name, e.Serial, e.NotAfter.Format(time.DateOnly))
	fmt.Fprintf(p.stdout, "  %s\n  %s\n  %s\n", cert, key, a.Path("ca.crt"))
	if bundle != "" {
		fmt.Fprintf(p.stdout, "  %s has all three\n", bundle)
	}
	fmt.Fprintf(p.stdout, `
The device needs these three. Register it, and try it:
  holdfast device add %s --no-credential
  mosquitto_pub -h GATEWAY -p 8883 --cafile %s --cert %s --key %s -i %s -q 1 -t dt/demo/%s/temp -m 21.5
`, e.Name, a.Path("ca.crt"), cert, key, e.Name, e.Name)
	return nil
}

var certRotateCommand = command{
	name: "cert rotate", args: "server | device ID | crl | ca [--revoke] [--dir DIR]",
	summary: "Make a new certificate, list or authority in the place of one", words: []string{"server|device|crl|ca", "device"},
	help: `server      a new key and certificate for the gateway, with the same names unless --host says others, and a new list
device ID   the same for a device
crl         the list of revoked certificates, with a new date
ca          a new authority beside the old one

What was there before stays valid until it ends, unless --revoke. Its files are kept in the folder retired. The gateway
takes new files by itself, or on SIGHUP, without dropping connections.

After rotate ca, ca.crt holds both authorities, and new certificates come from the new one. Give that ca.crt to every
device; then rotate server, and each device. When nothing of the old authority is left, rotate ca --drop-old takes it out
of ca.crt; it refuses while something of it is still in use.

` + certHelp,
	run: certRotate,
}

func certRotate(_ context.Context, p *program, args []string) error {
	fs := p.flags()
	dir := authorityFlag(fs)
	revoke := fs.Bool("revoke", false, "server, device: revoke what was there before")
	days := fs.Int("days", pki.DeviceDays, "device: the new one is valid for `N` days")
	bundle := fs.String("bundle", "", "device: also write all into one new PEM `FILE`")
	var hosts []string
	fs.Func("host", "server: a `HOST` name or IP address; may be repeated (none: those of before)", func(s string) error {
		hosts = append(hosts, s)
		return nil
	})
	name := fs.String("name", "", "ca: name of the `SITE` (none: that of before)")
	dropOld := fs.Bool("drop-old", false, "ca: take older authorities out of ca.crt instead")
	force := fs.Bool("force", false, "ca --drop-old: although something of theirs is in use")
	words, err := p.parse(fs, args, 1, 2)
	if err != nil {
		return err
	}
	what := words[0]
	switch {
	case what == "device" && len(words) < 2:
		return usagef("which device? holdfast cert rotate device ID")
	case what != "device" && len(words) > 1:
		return usagef("%q is too much", words[1])
	case *days < 1 || *days > pki.MaxDeviceDays:
		return usagef("--days is from 1 to %d", pki.MaxDeviceDays)
	}
	for flag, of := range map[string]string{"revoke": "server device", "days": "device", "bundle": "device", "host": "server", "name": "ca", "drop-old": "ca", "force": "ca"} {
		if isSet(fs, flag) && !strings.Contains(of, what) {
			return usagef("--%s is not for %s", flag, what)
		}
	}
	a, err := authorityAt(*dir)
	if err != nil {
		return err
	}
	switch what {
	case "server":
		e, err := a.RotateServer(hosts, *revoke)
		if err != nil {
			return certError(err, *dir)
		}
		fmt.Fprintf(p.stdout, "new certificate of the gateway, valid to %s: %s\n", e.NotAfter.Format(time.DateOnly), a.Path("server.crt"))
		fmt.Fprintln(p.stdout, "The gateway takes it by itself, or on SIGHUP; connections stay.")
	case "device":
		if err := freeFile(*bundle); err != nil {
			return err
		}
		e, err := a.RotateDevice(words[1], *days, *revoke)
		if err != nil {
			return certError(err, *dir)
		}
		if err := p.printDeviceCert(a, e, *bundle); err != nil {
			return err
		}
		if *revoke {
			fmt.Fprintf(p.stdout, "\nWhat it had before is revoked: %s\n", a.Path("crl.pem"))
		} else {
			fmt.Fprintf(p.stdout, "\nWhat it had before is valid until its end, or holdfast cert revoke SERIAL.\n")
		}
	case "crl":
		if err := a.RenewCRL(); err != nil {
			return certError(err, *dir)
		}
		fmt.Fprintf(p.stdout, "new list of revoked certificates, to be renewed by %s: %s\n", time.Now().Add(pki.CRLLifetime).UTC().Format(time.DateOnly), a.Path("crl.pem"))
	case "ca":
		if *dropOld {
			n, err := a.DropOldCAs(*force)
			var inUse *pki.InUseError
			if errors.As(err, &inUse) {
				return fmt.Errorf("%w: rotate or revoke them first, or say --force", err)
			}
			if err != nil {
				return certError(err, *dir)
			}
			fmt.Fprintf(p.stdout, "%s taken out of %s\n", count(n, "old certificate"), a.Path("ca.crt"))
			return nil
		}
		e, err := a.RotateCA(*name)
		if err != nil {
			return certError(err, *dir)
		}
		fmt.Fprintf(p.stdout, `new authority, valid to %s. %s holds it and the old one.

Next:
  1. give ca.crt to every device
  2. holdfast cert rotate server%s
  3. holdfast cert rotate device ID%s for each device
  4. holdfast cert rotate ca --drop-old%s
`, e.NotAfter.Format(time.DateOnly), a.Path("ca.crt"), dirArg(*dir), dirArg(*dir), dirArg(*dir))
	default:
		return usagef("there is no %q to rotate: server, device ID, crl or ca", what)
	}
	return nil
}

var certRevokeCommand = command{
	name: "cert revoke", args: "ID|SERIAL [--dir DIR]",
	summary: "Revoke the certificates of a device, or one by its serial number", words: []string{"device"},
	help: `They are put into crl.pem. The gateway takes the new list by itself, or on SIGHUP: nobody gets in with them any more.

` + certHelp,
	run: certRevoke,
}

func certRevoke(_ context.Context, p *program, args []string) error {
	fs := p.flags()
	dir := authorityFlag(fs)
	words, err := p.parse(fs, args, 1, 1)
	if err != nil {
		return err
	}
	a, err := authorityAt(*dir)
	if err != nil {
		return err
	}
	revoked, err := a.Revoke(words[0])
	if err != nil {
		return certError(err, *dir)
	}
	if len(revoked) == 0 {
		fmt.Fprintln(p.stdout, "it was revoked, or had ended, before")
	}
	for _, e := range revoked {
		fmt.Fprintf(p.stdout, "revoked: %s %s, serial %s\n", e.Kind, e.Name, e.Serial)
	}
	fmt.Fprintf(p.stdout, "new list: %s\n", a.Path("crl.pem"))
	return nil
}

var certListCommand = command{
	name: "cert list", args: "[--dir DIR] [--json]",
	summary: "List what the authority has issued, and when it ends",
	help:    certHelp, run: certList,
}

func certList(_ context.Context, p *program, args []string) error {
	fs := p.flags()
	dir := authorityFlag(fs)
	asJSON := fs.Bool("json", false, "print JSON, one certificate a line")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	a, err := authorityAt(*dir)
	if err != nil {
		return err
	}
	entries, err := a.List()
	if err != nil {
		return certError(err, *dir)
	}
	now := time.Now()
	rows := [][]string{{"KIND", "NAME", "STATE", "ENDS", "SERIAL"}}
	for _, e := range entries {
		state := e.State(now)
		if *asJSON {
			line := struct {
				pki.Entry
				State string `json:"state"`
			}{e, state}
			if err := p.printJSONLine(line); err != nil {
				return err
			}
			continue
		}
		if left := e.NotAfter.Sub(now); state == pki.StateValid && left < soon {
			state += fmt.Sprintf(", %s left", shortAge(left))
		}
		rows = append(rows, []string{e.Kind, e.Name, state, e.NotAfter.Format(time.DateOnly), e.Serial})
	}
	if !*asJSON {
		p.table(rows...)
	}
	return nil
}

// soon is how far ahead the end of a certificate is worth a word.
const soon = 30 * 24 * time.Hour
