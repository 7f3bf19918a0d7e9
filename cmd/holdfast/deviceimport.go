package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/devices"
	"holdfast/gateway/httpapi"
)

// importWorkers is how many devices are registered at once: each waits for a synced write, and those are shared.
const importWorkers = 32

const maxImportLine = 1 << 20

var deviceImportCommand = command{
	name: "device import", args: "FILE [--format csv|jsonl] [--existing skip|fail|update] [--secrets FILE] [--json] " + apiArgs,
	summary: "Register many devices from a file", words: []string{"file"},
	help: `CSV begins with a line that names its columns: id, and any of name, role, labels (k=v;k=v), password, fingerprint
(of a client certificate: SHA-256, hex), enabled (true, false). JSON lines are what POST /api/v1/devices takes, one a
line. FILE - is stdin. A device without password and fingerprint gets a token.

The tokens go to the file of --secrets, which must not be there yet, as lines of id,secret; else to stdout.
A bad line is told with its number and does not stop the others. Devices that are there already are left alone
(--existing skip), bad lines (fail), or get name, role, labels and enabled of the file (update), what the file
does not tell stays, credentials too. Exit code 1 if a line failed: mend those and run the same again with
--existing skip.

` + apiHelp,
	run: deviceImport,
}

// imported is what became of one line.
type imported struct {
	Line   int    `json:"line"`
	ID     string `json:"id,omitempty"`
	Result string `json:"result"` // registered, updated, skipped, failed
	Error  string `json:"error,omitempty"`
	Secret string `json:"secret,omitempty"`
}

// devicesImport is one run of holdfast device import.
type devicesImport struct {
	client   *apiClient
	name     string // of the file
	existing string
	report   func(imported) error // one call at a time
	progress *progress

	mu     sync.Mutex
	counts map[string]int // under mu; by result
	failed error          // under mu; why the rest is not tried
}

func deviceImport(ctx context.Context, p *program, args []string) (err error) {
	fs := p.flags()
	api := apiFlagsIn(fs)
	format := fs.String("format", "", "`csv|jsonl` (none: by the file's name)")
	existing := fs.String("existing", "fail", "what to do with devices that are there already, `skip|fail|update`")
	secrets := fs.String("secrets", "", "write the tokens to this new `FILE`")
	asJSON := fs.Bool("json", false, "print JSON, one object for each line of the file")
	files, err := p.parse(fs, args, 1, 1)
	if err != nil {
		return err
	}
	if !slices.Contains([]string{"skip", "fail", "update"}, *existing) {
		return usagef("--existing is skip, fail or update")
	}
	if *format == "" {
		switch ext := strings.ToLower(filepath.Ext(files[0])); ext {
		case ".csv":
			*format = "csv"
		case ".jsonl", ".ndjson", ".json":
			*format = "jsonl"
		default:
			return usagef("the name of %s does not tell what it is: say --format csv or --format jsonl", files[0])
		}
	}
	if *format != "csv" && *format != "jsonl" {
		return usagef("--format is csv or jsonl")
	}
	c, err := api.client()
	if err != nil {
		return err
	}
	in, size := os.Stdin, int64(0)
	if files[0] != "-" {
		if in, err = os.Open(files[0]); err != nil {
			return usageError{err.Error()}
		}
		defer in.Close()
		if fi, err := in.Stat(); err == nil && fi.Mode().IsRegular() {
			size = fi.Size()
		}
	}
	read := &countedReader{r: in}
	lines, err := importLines(*format, read)
	if err != nil {
		return fmt.Errorf("%s: %w", files[0], err)
	}
	out, closeSecrets, err := p.secretsOut(*secrets)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeSecrets()) }()

	i := &devicesImport{client: c, name: files[0], existing: *existing, counts: map[string]int{}, progress: newProgress(p.stderr)}
	i.progress.total, i.progress.done = size, read.n.Load
	i.report = func(r imported) error {
		secret := r.Secret
		if *secrets != "" {
			r.Secret = ""
		}
		switch {
		case *asJSON:
			if err := p.printJSONLine(r); err != nil {
				return err
			}
			if *secrets == "" {
				return nil
			}
		case r.Error != "":
			i.progress.say("%s:%d: %s%s", i.name, r.Line, prefixed(r.ID), r.Error)
		}
		if secret != "" {
			return out(r.ID, secret)
		}
		return nil
	}
	ctx, stop := interruptible(ctx)
	defer stop()
	began := time.Now()
	err = i.run(ctx, lines)
	i.progress.clear()
	n := i.counts
	fmt.Fprintf(p.stderr, "%s: %d registered, %d updated, %d skipped, %d failed in %s\n", files[0], n["registered"], n["updated"], n["skipped"], n["failed"],
		time.Since(began).Round(time.Millisecond))
	switch {
	case err != nil:
		fmt.Fprintln(p.stderr, "the rest of the file was not tried: run the same again with --existing skip")
		return err
	case n["failed"] > 0:
		return errReported
	}
	return nil
}

func prefixed(id string) string {
	if id == "" {
		return ""
	}
	return shown(id, 64) + ": "
}

// secretsOut gives what writes one secret, so that it is in the file when it returns: the gateway cannot tell it again.
func (p *program) secretsOut(file string) (write func(id, secret string) error, done func() error, err error) {
	w, done := p.stdout, func() error { return nil }
	if file != "" {
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, os.ErrExist) {
			return nil, nil, usagef("--secrets: %s exists already, and may hold the only copy of secrets: name another file", file)
		}
		if err != nil {
			return nil, nil, err
		}
		w, done = f, func() error { return errors.Join(f.Sync(), f.Close()) }
	}
	header := false
	return func(id, secret string) error {
		var b bytes.Buffer
		c := csv.NewWriter(&b)
		if !header {
			_ = c.Write([]string{"id", "secret"}) // to memory
			header = true
		}
		_ = c.Write([]string{id, secret})
		c.Flush()
		_, err := w.Write(b.Bytes())
		return err
	}, done, nil
}

// run registers what lines gives. The error is why it stopped before the end.
func (i *devicesImport) run(ctx context.Context, lines func() (importLine, bool)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	i.progress.start()
	defer i.progress.stop()
	work := make(chan importLine)
	var wg sync.WaitGroup
	for range importWorkers {
		wg.Go(func() {
			for l := range work {
				if err := i.one(ctx, l); err != nil {
					i.mu.Lock()
					if i.failed == nil {
						i.failed = err
					}
					i.mu.Unlock()
					cancel()
				}
			}
		})
	}
	seen := map[string]int{}
	for ctx.Err() == nil {
		l, ok := lines()
		if !ok {
			break
		}
		if first, double := seen[l.device.ID]; double && l.err == nil && l.device.ID != "" {
			l.err = fmt.Errorf("is on line %d already", first)
		} else if l.err == nil {
			seen[l.device.ID] = l.number
		}
		select {
		case work <- l:
		case <-ctx.Done():
		}
	}
	close(work)
	wg.Wait()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.failed == nil && ctx.Err() != nil {
		return errInterrupted
	}
	return i.failed
}

// one registers a device and reports it. The error is one that the next lines would meet as well.
func (i *devicesImport) one(ctx context.Context, l importLine) error {
	r := imported{Line: l.number, ID: l.device.ID, Result: "registered"}
	err := l.err
	if err == nil {
		r.Result, r.Secret, err = i.register(ctx, &l)
	}
	var gone unreachableError
	var refusal *apiError
	switch {
	case err == nil:
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		return err
	case errors.As(err, &gone), errors.As(err, &refusal) && (refusal.status == http.StatusUnauthorized || refusal.status == http.StatusForbidden):
		return fmt.Errorf("line %d: %w", l.number, err)
	default:
		r.Result, r.Error = "failed", err.Error()
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.counts[r.Result]++
	i.progress.count(r.Result == "failed")
	return i.report(r)
}

func (i *devicesImport) register(ctx context.Context, l *importLine) (result, secret string, err error) {
	var made httpapi.DeviceMade
	err = i.client.call(ctx, http.MethodPost, "/api/v1/devices", &l.device, &made)
	if !refused(err, "device_exists") {
		return "registered", made.Secret, err
	}
	switch i.existing {
	case "skip":
		return "skipped", "", nil
	case "update":
		patch := httpapi.DevicePatch{Labels: l.device.Labels, Enabled: l.device.Enabled}
		if l.device.Name != "" {
			patch.Name = &l.device.Name
		}
		if l.device.Role != "" {
			patch.Role = &l.device.Role
		}
		return "updated", "", i.client.call(ctx, http.MethodPatch, devicePath(l.device.ID), patch, nil)
	}
	return "", "", err
}

// importLine is one line of a file: a device, or why it is none.
type importLine struct {
	number int
	device httpapi.NewDevice
	err    error
}

// importLines reads the devices of a file, one a call, until it returns false. The error is of the file as a whole.
func importLines(format string, r io.Reader) (func() (importLine, bool), error) {
	br := bufio.NewReader(r)
	if b, err := br.Peek(3); err == nil && string(b) == "\ufeff" { // spreadsheets put it there
		_, _ = br.Discard(3)
	}
	if format == "csv" {
		return csvLines(br)
	}
	s := bufio.NewScanner(br)
	s.Buffer(nil, maxImportLine)
	number, ended := 0, false
	return func() (importLine, bool) {
		for !ended && s.Scan() {
			number++
			text := bytes.TrimSpace(s.Bytes())
			if len(text) == 0 {
				continue
			}
			l := importLine{number: number}
			dec := json.NewDecoder(bytes.NewReader(text))
			dec.DisallowUnknownFields()
			if err := dec.Decode(&l.device); err != nil {
				l.err = fmt.Errorf("is not a device in JSON: %s", strings.TrimPrefix(err.Error(), "json: "))
			} else if dec.More() {
				l.err = errors.New("has something after the device")
			}
			return checked(l), true
		}
		if err := s.Err(); err != nil && !ended {
			ended = true
			return importLine{number: number + 1, err: err}, true
		}
		return importLine{}, false
	}, nil
}

func checked(l importLine) importLine {
	if l.err == nil && l.device.ID == "" {
		l.err = errors.New("has no id")
	}
	return l
}

var importColumns = []string{"id", "name", "role", "labels", "password", "fingerprint", "enabled"}

func csvLines(r io.Reader) (func() (importLine, bool), error) {
	c := csv.NewReader(r)
	c.FieldsPerRecord = -1
	c.TrimLeadingSpace = true
	header, err := c.Read()
	if err != nil {
		return nil, fmt.Errorf("has no line that names the columns, at least id: %w", err)
	}
	for i := range header {
		header[i] = strings.ToLower(strings.TrimSpace(header[i]))
		if !slices.Contains(importColumns, header[i]) {
			return nil, fmt.Errorf("line 1: there is no column %q, but %s", shown(header[i], 40), strings.Join(importColumns, ", "))
		}
		if slices.Contains(header[:i], header[i]) {
			return nil, fmt.Errorf("line 1: column %s is there twice", header[i])
		}
	}
	if !slices.Contains(header, "id") {
		return nil, errors.New("line 1: the column id is missing")
	}
	ended := false
	return func() (importLine, bool) {
		if ended {
			return importLine{}, false
		}
		record, err := c.Read()
		var parse *csv.ParseError
		switch {
		case errors.Is(err, io.EOF):
			return importLine{}, false
		case errors.As(err, &parse):
			return importLine{number: parse.StartLine, err: fmt.Errorf("is not CSV: %w", parse.Err)}, true
		case err != nil:
			ended = true
			return importLine{err: err}, true
		}
		line, _ := c.FieldPos(0)
		l := importLine{number: line}
		if len(record) != len(header) {
			l.err = fmt.Errorf("has %d fields, the first line names %d", len(record), len(header))
			return l, true
		}
		for i, value := range record {
			if err := setColumn(&l.device, header[i], value); err != nil && l.err == nil {
				l.err = err
			}
		}
		return checked(l), true
	}, nil
}

func setColumn(d *httpapi.NewDevice, column, value string) error {
	if column != "password" {
		value = strings.TrimSpace(value)
	}
	if value == "" {
		return nil
	}
	credential := func(c httpapi.NewCredential) error {
		if d.Credential != nil {
			return errors.New("has a password and a fingerprint: give one of them")
		}
		d.Credential = &c
		return nil
	}
	switch column {
	case "id":
		d.ID = value
	case "name":
		d.Name = value
	case "role":
		d.Role = value
	case "labels":
		d.Labels = map[string]string{}
		for _, kv := range strings.Split(value, ";") {
			if strings.TrimSpace(kv) == "" {
				continue
			}
			k, v, ok := strings.Cut(kv, "=")
			if k = strings.TrimSpace(k); !ok || k == "" {
				return fmt.Errorf("labels: %q is not key=value; several are separated by ;", shown(kv, 40))
			}
			d.Labels[k] = strings.TrimSpace(v)
		}
	case "password":
		return credential(httpapi.NewCredential{Kind: devices.CredentialPassword, Password: value})
	case "fingerprint":
		return credential(httpapi.NewCredential{Kind: devices.CredentialCertificate, Fingerprint: value})
	case "enabled":
		on, err := strconv.ParseBool(strings.ToLower(value))
		if err != nil {
			return fmt.Errorf("enabled: %q is neither true nor false", shown(value, 40))
		}
		d.Enabled = &on
	}
	return nil
}

// countedReader counts what is read of a file.
type countedReader struct {
	r io.Reader
	n atomic.Int64
}

func (c *countedReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n.Add(int64(n))
	return n, err
}
