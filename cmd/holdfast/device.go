package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/internal/config"
)

var deviceAddCommand = command{
	name: "device add", args: "ID [flags]",
	summary: "Register a device and make its token",
	help: `ID is the client id that the device connects with. Without a flag about credentials the device gets a token,
which is shown this once: it is the device's MQTT password, its user name being its id. --password-file takes
the password that somebody chose, at least 12 characters, the only line of the file. --certificate pins a
client certificate; --no-credential registers the device for one that names it (holdfast cert device).

` + apiHelp,
	run: deviceAdd,
}

func deviceAdd(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	var d httpapi.NewDevice
	var passwordFile, certificate string
	var none, disabled bool
	fs.StringVar(&d.Name, "name", "", "what people call it, `NAME`")
	labelFlag(fs, &d.Labels)
	fs.StringVar(&d.Role, "role", "", "what it may do, a `ROLE` of the configuration (none: device)")
	fs.StringVar(&passwordFile, "password-file", "", "`FILE` with the password that it has already")
	fs.StringVar(&certificate, "certificate", "", "`FILE` with the client certificate that it shows (PEM)")
	fs.BoolVar(&none, "no-credential", false, "it shows a client certificate that names it, and nothing else")
	fs.BoolVar(&disabled, "disabled", false, "it may not connect yet")
	asJSON := fs.Bool("json", false, "print JSON")
	ids, err := p.parse(fs, args, 1, 1)
	if err != nil {
		return err
	}
	d.ID = ids[0]
	if disabled {
		d.Enabled = new(bool)
	}
	if d.Credential, err = credentialOf(passwordFile, certificate, none); err != nil {
		return err
	}
	c, err := api.client()
	if err != nil {
		return err
	}
	var made httpapi.DeviceMade
	if err := c.call(ctx, http.MethodPost, "/api/v1/devices", d, &made); err != nil {
		return hint(err, "device_exists", "look at it with holdfast device show %s, or give it a new token with holdfast device rotate %s", d.ID, d.ID)
	}
	if *asJSON {
		return p.printJSON(made)
	}
	fmt.Fprintf(p.stdout, "device %s is registered, role %s%s\n", made.Device.ID, made.Device.Role, map[bool]string{true: "", false: ", disabled"}[made.Device.Enabled])
	p.printSecret(made.Device.ID, made.Secret)
	if d.Credential != nil && d.Credential.Kind == "none" {
		fmt.Fprintf(p.stdout, "it has no credential: it connects with a client certificate that names it, such as one of holdfast cert device %s\n", d.ID)
	}
	return nil
}

// labelFlag declares --label key=value.
func labelFlag(fs *flag.FlagSet, labels *map[string]string) {
	fs.Func("label", "a label, `KEY=VALUE`; may be repeated", func(s string) error {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return fmt.Errorf("%q is not KEY=VALUE", s)
		}
		if *labels == nil {
			*labels = map[string]string{}
		}
		(*labels)[k] = v
		return nil
	})
}

// credentialOf makes a credential of what the flags say; nil is a token.
func credentialOf(passwordFile, certificate string, none bool) (*httpapi.NewCredential, error) {
	given := 0
	for _, g := range []bool{passwordFile != "", certificate != "", none} {
		if g {
			given++
		}
	}
	switch {
	case given > 1:
		return nil, usagef("--password-file, --certificate and --no-credential exclude each other: add the others later")
	case passwordFile != "":
		b, err := readLimited(passwordFile, 4<<10)
		if err != nil {
			return nil, err
		}
		password := strings.TrimRight(string(b), "\r\n")
		if password == "" || strings.ContainsAny(password, "\r\n") {
			return nil, fmt.Errorf("%s has to hold the password as its only line", passwordFile)
		}
		return &httpapi.NewCredential{Kind: devices.CredentialPassword, Password: password}, nil
	case certificate != "":
		fingerprint, err := fingerprintOf(certificate)
		if err != nil {
			return nil, err
		}
		return &httpapi.NewCredential{Kind: devices.CredentialCertificate, Fingerprint: fingerprint}, nil
	case none:
		return &httpapi.NewCredential{Kind: "none"}, nil
	}
	return nil, nil
}

// fingerprintOf gives the SHA-256 of the first certificate in a file.
func fingerprintOf(file string) (string, error) {
	b, err := readLimited(file, 1<<20)
	if err != nil {
		return "", err
	}
	for rest := b; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			b = block.Bytes
			break
		}
	}
	if _, err := x509.ParseCertificate(b); err != nil {
		return "", fmt.Errorf("%s holds no certificate (PEM or DER)", file)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

// readLimited reads a file, or stdin for "-", that is no longer than most.
func readLimited(file string, most int64) ([]byte, error) {
	f := os.Stdin
	if file != "-" {
		var err error
		if f, err = os.Open(file); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%s is longer than %s", file, bytesText(most))
	}
	return b, nil
}

// printSecret shows a token that was just made, and how it is used.
func (p *program) printSecret(id, secret string) {
	if secret == "" {
		return
	}
	fmt.Fprintf(p.stdout, `
token   %s

It is shown this once. The device gives it as its MQTT password:
  mosquitto_pub -h GATEWAY -i %s -u %s -P '%s' -q 1 -t dt/demo/%s/temp -m 21.5
`, secret, id, id, secret, id)
}

// hint adds a way out to a refusal with a code, unless the gateway has named one.
func hint(err error, code, format string, args ...any) error {
	if refused(err, code) && !strings.Contains(err.Error(), "holdfast ") {
		return fmt.Errorf("%w: "+format, append([]any{err}, args...)...)
	}
	return err
}

// withDevices points to the list after a refusal of an id.
func withDevices(err error) error {
	return hint(err, devices.CodeUnknownDevice, "holdfast device list shows them all")
}

func devicePath(id string, rest ...string) string {
	path := "/api/v1/devices/" + url.PathEscape(id)
	for _, r := range rest {
		path += "/" + r
	}
	return path
}

var deviceListCommand = command{
	name: "device list", args: "[flags]",
	summary: "List the devices",
	help: `Filters are combined: all of them have to fit.

` + apiHelp,
	run: deviceList,
}

func deviceList(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	q := url.Values{}
	param := func(name, usage string) {
		fs.Func(name, usage, func(s string) error { q.Set(name, s); return nil })
	}
	param("search", "those with `TEXT` in id, name or a label's value")
	param("role", "those with this `ROLE`")
	param("label", "those with a label, `KEY` or KEY=VALUE")
	connected := fs.Bool("connected", false, "those that are connected")
	offline := fs.Bool("offline", false, "those that are not connected")
	disabled := fs.Bool("disabled", false, "those that may not connect")
	limit := fs.Int("limit", 1000, "`N` at most")
	asJSON := fs.Bool("json", false, "print JSON, one device a line")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	switch {
	case *connected && *offline:
		return usagef("--connected and --offline exclude each other")
	case *limit < 1:
		return usagef("--limit has to be at least 1")
	case *connected || *offline:
		q.Set("connected", strconv.FormatBool(*connected))
	}
	if *disabled {
		q.Set("enabled", "false")
	}
	c, err := api.client()
	if err != nil {
		return err
	}
	var list []devices.Device
	more, err := eachDevice(ctx, c, q, *limit, func(d *devices.Device) error {
		if *asJSON {
			return p.printJSONLine(d)
		}
		list = append(list, *d)
		return nil
	})
	if err != nil {
		return err
	}
	if !*asJSON {
		p.printDevices(list, time.Now())
	}
	if more {
		fmt.Fprintf(p.stderr, "there are more than %d: --limit shows more\n", *limit)
	}
	return nil
}

// pageSize is what one call asks for.
const pageSize = 500

// eachDevice calls fn for the devices that q chooses, limit at most. more: there are others.
func eachDevice(ctx context.Context, c *apiClient, q url.Values, limit int, fn func(*devices.Device) error) (more bool, err error) {
	for n := 0; n < limit; {
		q.Set("limit", strconv.Itoa(min(pageSize, limit-n)))
		var page httpapi.DevicePage
		if err := c.call(ctx, http.MethodGet, "/api/v1/devices?"+q.Encode(), nil, &page); err != nil {
			return false, err
		}
		for i := range page.Devices {
			if err := fn(&page.Devices[i]); err != nil {
				return false, err
			}
		}
		n += len(page.Devices)
		if page.Next == "" {
			return false, nil
		}
		q.Set("after", page.Next)
	}
	return true, nil
}

func (p *program) printDevices(list []devices.Device, now time.Time) {
	if len(list) == 0 {
		fmt.Fprintln(p.stdout, "no device (holdfast device add registers one)")
		return
	}
	rows := [][]string{{"ID", "NAME", "ROLE", "STATE", "LAST SEEN", "ADDRESS", "CREDENTIALS"}}
	for i := range list {
		d := &list[i]
		rows = append(rows, []string{
			d.ID, orDash(shown(d.Name, 24)), d.Role, deviceState(d), seen(&d.Presence, now), orDash(d.Presence.Address), credentialKinds(d, now),
		})
	}
	p.table(rows...)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func deviceState(d *devices.Device) string {
	switch {
	case !d.Enabled:
		return "disabled"
	case d.Presence.Connected:
		return "connected"
	}
	return "offline"
}

func seen(pr *devices.Presence, now time.Time) string {
	switch {
	case pr.Connected:
		return "now"
	case pr.LastSeen.IsZero():
		return "never"
	}
	return shortAge(now.Sub(pr.LastSeen)) + " ago"
}

// shortAge gives a duration in its largest unit, as people say it: "42s", "5m", "3h", "12d".
func shortAge(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// credentialKinds tells what lets a device in: what has expired does not.
func credentialKinds(d *devices.Device, now time.Time) string {
	if d.Anonymous {
		return "anonymous"
	}
	counts := map[string]int{}
	for _, c := range d.Credentials {
		if c.Expires.IsZero() || c.Expires.After(now) {
			counts[c.Kind]++
		}
	}
	var kinds []string
	for _, k := range slices.Sorted(maps.Keys(counts)) {
		if counts[k] > 1 {
			k = fmt.Sprintf("%d %ss", counts[k], k)
		}
		kinds = append(kinds, k)
	}
	if len(kinds) == 0 {
		return "none"
	}
	return strings.Join(kinds, ", ")
}

var deviceShowCommand = command{
	name: "device show", args: "ID [--json] " + apiArgs,
	summary: "Show all that is known about a device", words: []string{"device"},
	help: apiHelp, run: deviceShow,
}

func deviceShow(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	asJSON := fs.Bool("json", false, "print JSON")
	c, ids, err := api.asks(p, fs, args, 1, 1)
	if err != nil {
		return err
	}
	var d devices.Device
	if err := c.call(ctx, http.MethodGet, devicePath(ids[0]), nil, &d); err != nil {
		return withDevices(err)
	}
	if *asJSON {
		return p.printJSON(d)
	}
	p.printDevice(&d, time.Now())
	return nil
}

func (p *program) printDevice(d *devices.Device, now time.Time) {
	line := func(key, value string) { fmt.Fprintf(p.stdout, "%-11s %s\n", key, value) }
	line("device", d.ID)
	if d.Name != "" {
		line("name", shown(d.Name, 200))
	}
	for _, k := range slices.Sorted(maps.Keys(d.Labels)) {
		line("label", k+"="+shown(d.Labels[k], 200))
	}
	line("role", d.Role)
	line("state", deviceState(d))
	line("registered", clockText(d.Created))
	pr := &d.Presence
	what := "never seen"
	switch {
	case pr.Connected:
		what = fmt.Sprintf("connected for %s from %s, %s, listener %s", shortAge(now.Sub(pr.Since)), pr.Address, pr.Protocol, pr.Listener)
		if pr.TLS {
			what += ", TLS"
		}
	case !pr.LastSeen.IsZero():
		what = fmt.Sprintf("last seen %s (%s) from %s", clockText(pr.LastSeen), seen(pr, now), pr.Address)
		if pr.Reason != "" {
			what += ", gone because: " + shown(pr.Reason, 200)
		}
	}
	line("presence", what)
	if !pr.LastMessage.IsZero() {
		line("message", fmt.Sprintf("last %s (%s ago)", clockText(pr.LastMessage), shortAge(now.Sub(pr.LastMessage))))
	}
	if pr.Will != "" {
		line("will", shown(pr.Will, 200))
	}
	if d.Anonymous {
		line("credentials", "none: it came by itself, as devices.anonymous allows")
		return
	}
	fmt.Fprintln(p.stdout)
	if len(d.Credentials) == 0 {
		fmt.Fprintln(p.stdout, "no credential: only a client certificate that names it lets it in")
		return
	}
	rows := [][]string{{"CREDENTIAL", "KIND", "MADE", "EXPIRES", "FINGERPRINT"}}
	for _, c := range d.Credentials {
		expires := expiryText(c.Expires)
		if !c.Expires.IsZero() && !c.Expires.After(now) {
			expires += " (it has)"
		}
		rows = append(rows, []string{c.ID, c.Kind, clockText(c.Created), expires, c.Fingerprint})
	}
	p.table(rows...)
}

// clockText gives a time as people here read it.
func clockText(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

var deviceEnableCommand = command{
	name: "device enable", args: "ID [--json] " + apiArgs, words: []string{"device"},
	summary: "Let a device connect again",
	help:    apiHelp,
	run: func(ctx context.Context, p *program, args []string) error {
		return deviceSwitch(ctx, p, args, true, "may connect")
	},
}

var deviceDisableCommand = command{
	name: "device disable", args: "ID [--json] " + apiArgs, words: []string{"device"},
	summary: "Disconnect a device and keep it out, until it is enabled",
	help:    apiHelp,
	run: func(ctx context.Context, p *program, args []string) error {
		return deviceSwitch(ctx, p, args, false, "is disabled; if it was connected, it is not any more")
	},
}

func deviceSwitch(ctx context.Context, p *program, args []string, enabled bool, done string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	asJSON := fs.Bool("json", false, "print JSON")
	c, ids, err := api.asks(p, fs, args, 1, 1)
	if err != nil {
		return err
	}
	var d devices.Device
	if err := c.call(ctx, http.MethodPatch, devicePath(ids[0]), httpapi.DevicePatch{Enabled: &enabled}, &d); err != nil {
		return withDevices(err)
	}
	if *asJSON {
		return p.printJSON(d)
	}
	fmt.Fprintf(p.stdout, "device %s %s\n", d.ID, done)
	return nil
}

var deviceRemoveCommand = command{
	name: "device remove", args: "ID [--json] " + apiArgs, words: []string{"device"},
	summary: "Forget a device, disconnect it, and cancel its commands",
	help:    apiHelp, run: deviceRemove,
}

func deviceRemove(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	asJSON := fs.Bool("json", false, "print JSON")
	c, ids, err := api.asks(p, fs, args, 1, 1)
	if err != nil {
		return err
	}
	if err := c.call(ctx, http.MethodDelete, devicePath(ids[0]), nil, nil); err != nil {
		return withDevices(err)
	}
	if *asJSON {
		return p.printJSON(map[string]string{"removed": ids[0]})
	}
	fmt.Fprintf(p.stdout, "device %s is removed\n", ids[0])
	return nil
}

var deviceRotateCommand = command{
	name: "device rotate", args: "ID [--overlap D] [--lifetime D] [--json] " + apiArgs, words: []string{"device"},
	summary: "Make a new token for a device; its other credentials expire",
	help: `The others stay valid for the overlap, so that the device can be given the new one in peace. With --overlap 0
they end at once, and whoever is connected with one is disconnected.

` + apiHelp,
	run: deviceRotate,
}

func deviceRotate(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	overlap := durationFlag(fs, "overlap", 24*time.Hour, "the others stay valid for `D`")
	lifetime := durationFlag(fs, "lifetime", 0, "the new one expires after `D` (none: never)")
	asJSON := fs.Bool("json", false, "print JSON")
	c, ids, err := api.asks(p, fs, args, 1, 1)
	if err != nil {
		return err
	}
	body := httpapi.NewCredential{Kind: devices.CredentialToken, RetireOthers: overlap.String()}
	if *lifetime > 0 {
		body.Lifetime = lifetime.String()
	}
	var made httpapi.CredentialMade
	if err := c.call(ctx, http.MethodPost, devicePath(ids[0], "credentials"), body, &made); err != nil {
		return withDevices(err)
	}
	if *asJSON {
		return p.printJSON(made)
	}
	fmt.Fprintf(p.stdout, "device %s has a new token\n", ids[0])
	p.printSecret(ids[0], made.Secret)
	if *overlap > 0 {
		fmt.Fprintf(p.stdout, "Its other credentials expire on %s.\n", clockText(time.Now().Add(*overlap)))
	} else {
		fmt.Fprintln(p.stdout, "Its other credentials are worth nothing any more.")
	}
	return nil
}

// durationFlag declares a flag that is written as durations are in the configuration: 30s, 5m, 72h, 7d.
func durationFlag(fs *flag.FlagSet, name string, def time.Duration, usage string) *time.Duration {
	d := durationValue(def)
	fs.Var(&d, name, usage)
	return (*time.Duration)(&d)
}

type durationValue time.Duration

// String is for flag: the default, as it is shown.
func (d *durationValue) String() string {
	if d == nil || *d == 0 {
		return ""
	}
	return config.FormatDuration(time.Duration(*d))
}

// Set is for flag.
func (d *durationValue) Set(s string) error {
	v, err := config.ParseDuration(s)
	if err != nil {
		return err
	}
	*d = durationValue(v)
	return nil
}
