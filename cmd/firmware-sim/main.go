// Command firmware-sim runs a fleet of simulated devices against an MQTT broker, and can check
// upstream that nothing is lost that was acknowledged.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

const intro = `firmware-sim runs simulated devices against an MQTT broker, as firmware behaves: they sample, keep what is
not acknowledged in flash, lose their link, crash, and send again.

    firmware-sim --broker mqtt://127.0.0.1:1883 --devices 100 --rate 1 --duration 30s
    firmware-sim --broker mqtt://127.0.0.1:1883 --flaky 0.05 --crash 0.01 --verify mqtt://127.0.0.1:1884
    firmware-sim --broker mqtt://127.0.0.1:1883 --devices 100 --rate 0 --window 100 --size 256 --qos 1
    firmware-sim --broker mqtt://127.0.0.1:1883 --devices 100 --no-samples --commands --sleep --crash 0.01

Each message is JSON on dt/{app}/{device}/{stream} and counts: "n" is 1, 2, 3 … for each device and stream.
With --verify what arrives upstream, in any format, is held against what the broker acknowledged.

With --commands devices do what comes on cmd/{device}/req/{id}/{name} and answer on
cmd/{device}/res/{id}/{accepted|progress|succeeded|failed|rejected}. What they do follows from the name:
    do       work for --execution, tell progress, then end by --fail, --reject, --ignore (any other name too)
    query    as do, but begun again after a crash; everything else then says: failed, interrupted by a restart
    update   ten times as long, with ten reports of progress        slow     the same without
    echo     the payload is the result                              reboot   restart, then say so
    fail     fails                  reject   does not begin         ignore   never answers
An id that comes again is answered from flash (256 are kept) and not done again. --json lists each command with
how often it was received and executed, and how it ended.

Exit codes: 0 done; 1 nothing could connect, or --verify found a loss, a wrong order or an invention, or a device
has executed a command twice or got its commands out of order ("n" of their payload, where they have it); 2 wrong usage.
`

// groups are the flags in the order in which they are shown.
var groups = []struct {
	title string
	flags []string
}{
	{"Where", []string{"broker", "version", "username", "password-file", "secrets", "ca", "cert", "key", "cert-dir", "server-name"}},
	{"Who", []string{"devices", "profile", "prefix", "first", "app"}},
	{"How much", []string{"rate", "duration", "messages", "no-samples", "window", "qos", "size"}},
	{"Commands and sleep", []string{"commands", "execution", "fail", "reject", "ignore", "behaviour", "sleep", "awake", "period"}},
	{"What goes wrong", []string{"flaky", "crash", "buffer", "clean", "keep-alive", "max-backoff", "connect-rate", "seed"}},
	{"Checking and printing", []string{"drain", "verify", "verify-filter", "verify-username", "verify-password-file", "verify-ca", "verify-wait", "json", "quiet"}},
}

// options are the parsed flags.
type options struct {
	sim          firmwaresim.Config
	version, qos string
	verify       verifyOptions
	json         bool
	quiet        bool
	passwordFile string
	ca           string
	cert         string
	key          string
	serverName   string
	secrets      string
	certDir      string
	sleep        bool
}

// errHelped: help was asked for and given.
var errHelped = errors.New("help was asked for")

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stdout)
	if errors.Is(err, errHelped) {
		return exitDone
	}
	var fleet *firmwaresim.Fleet
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	screen := newScreen(stderr, o.quiet)
	if err == nil {
		if !o.quiet {
			log = slog.New(screen.above(log.Handler()))
		} else {
			log = slog.New(slog.DiscardHandler)
		}
		fleet, err = firmwaresim.New(o.sim, log)
	}
	if err != nil {
		for _, line := range strings.Split(err.Error(), "\n") {
			fmt.Fprintf(stderr, "firmware-sim: %s\n", line)
		}
		fmt.Fprintln(stderr, "firmware-sim --help shows all flags.")
		return exitUsage
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	r, err := simulate(ctx, o, fleet, screen, log)
	if printErr := r.print(stdout, o.json); printErr != nil && err == nil {
		err = printErr
	}
	if err != nil {
		fmt.Fprintf(stderr, "firmware-sim: %v\n", err)
		return exitFailed
	}
	return exitDone
}

// result is what is printed in the end.
type result struct {
	Report  *firmwaresim.Report  `json:"report"`
	Verdict *firmwaresim.Verdict `json:"verdict,omitempty"`
	Arrived *arrivedStats        `json:"upstream,omitempty"`
	// Of commands, where devices take them.
	CommandVerdict *firmwaresim.CommandVerdict `json:"command_verdict,omitempty"`
	Commands       *firmwaresim.CommandLedger  `json:"commands,omitempty"`
}

// simulate runs the fleet and, if asked to, the check.
func simulate(ctx context.Context, o options, fleet *firmwaresim.Fleet, screen *screen, log *slog.Logger) (r result, err error) {
	var v *verifier
	if o.verify.URL != "" {
		if v, err = startVerifier(ctx, o.verify, fleet.DeviceIDs(), log); err != nil {
			return r, err
		}
		defer v.stop()
	}
	stop := screen.follow(func(last *firmwaresim.Snapshot) string { return progress(fleet, v, last) })
	report, err := fleet.Run(ctx)
	r.Report = &report
	if err == nil && v != nil {
		verdict := v.settle(fleet.Ledger())
		stats := v.stats()
		r.Verdict, r.Arrived = &verdict, &stats
		switch {
		case verdict.Lost > 0:
			err = fmt.Errorf("%d messages were acknowledged and did not arrive within %v of the last arrival", verdict.Lost, o.verify.wait)
		case !verdict.OK():
			err = fmt.Errorf("nothing is lost, but %d messages arrived out of order and %d that were never sent", verdict.OutOfOrder, verdict.Unknown)
		}
	}
	stop()
	if o.sim.Commands {
		r.Commands = fleet.CommandLedger()
		verdict := r.Commands.Verify(nil)
		r.CommandVerdict = &verdict
		if !verdict.OK() {
			err = errors.Join(err, fmt.Errorf("%d commands were executed twice and %d came out of order", verdict.ExecutedTwice, verdict.OutOfOrder))
		}
	}
	return r, err
}

func (r result) print(w io.Writer, asJSON bool) error {
	if asJSON {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	if r.Report == nil {
		return nil
	}
	_, err := io.WriteString(w, r.Report.String())
	if err == nil && r.Verdict != nil {
		_, err = fmt.Fprintf(w, "%s%s", r.Arrived, verdictText(*r.Verdict))
	}
	if err == nil && r.CommandVerdict != nil && !r.CommandVerdict.OK() {
		for _, e := range r.CommandVerdict.Examples {
			if _, err = fmt.Fprintf(w, "%-18s %s\n", "wrong command", e); err != nil {
				break
			}
		}
	}
	return err
}

// flags declares all flags, to be parsed into o.
func flags(o *options) *flag.FlagSet {
	fs := flag.NewFlagSet("firmware-sim", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&o.sim.Broker, "broker", "", "`URL`: the broker, mqtt://host[:1883] or mqtts://host[:8883] (needed)")
	fs.StringVar(&o.version, "version", "5", "`V`: MQTT version, 4 for 3.1.1, or 5")
	fs.StringVar(&o.sim.Username, "username", "", "`NAME`: user of every device")
	fs.StringVar(&o.passwordFile, "password-file", "", "`FILE`: its password")
	fs.StringVar(&o.ca, "ca", "", "`FILE`: who signed the broker's certificate, PEM; none: the system's authorities")
	fs.StringVar(&o.cert, "cert", "", "`FILE`: client certificate of every device, PEM")
	fs.StringVar(&o.key, "key", "", "`FILE`: its key, PEM")
	fs.StringVar(&o.secrets, "secrets", "", "`FILE`: CSV with a line id,secret for each device: its id is its user, the secret its password")
	fs.StringVar(&o.certDir, "cert-dir", "", "`DIR`: client certificate of each device there, ID.crt and ID.key, PEM; read at each connection")
	fs.StringVar(&o.serverName, "server-name", "", "`NAME`: the one in the broker's certificate, if not the host of the URL")

	fs.IntVar(&o.sim.Devices, "devices", 10, "`N`: how many devices")
	fs.StringVar(&o.sim.Profile, "profile", "mixed", "`NAME`: what they measure: "+strings.Join(firmwaresim.Profiles(), ", "))
	fs.StringVar(&o.sim.Prefix, "prefix", "sim", "`P`: device ids are P-00001 and so on")
	fs.IntVar(&o.sim.First, "first", 1, "`N`: number of the first device")
	fs.StringVar(&o.sim.App, "app", "", "`APP`: second level of the topics; none: ward, plant, grid by profile")

	fs.Float64Var(&o.sim.Rate, "rate", 1, "`R`: messages a second of each device; 0: as fast as the window allows")
	fs.DurationVar(&o.sim.Duration, "duration", 0, "`D`: how long to sample, such as 30s; 0: until --messages or a signal")
	fs.Uint64Var(&o.sim.Messages, "messages", 0, "`N`: messages that each device samples; 0: no limit")
	fs.BoolVar(&o.sim.NoSamples, "no-samples", false, "publish nothing of their own: devices that only take commands")
	fs.IntVar(&o.sim.Window, "window", 16, "`N`: messages in flight on each device")
	fs.StringVar(&o.qos, "qos", "profile", "`Q`: 0, 1 or 2 for all messages, or profile: as each stream has it")
	fs.IntVar(&o.sim.Size, "size", 0, fmt.Sprintf("`BYTES`: exact length of each payload, at least %d; 0: as the values need", firmwaresim.MinSize))

	fs.BoolVar(&o.sim.Commands, "commands", false, "devices take commands")
	e := &o.sim.Execution
	fs.DurationVar(&e.Duration, "execution", 0, "`D`: how long a command takes (0: 200ms, negative: no time)")
	fs.Float64Var(&e.Fail, "fail", 0, "`P`: probability that a command fails")
	fs.Float64Var(&e.Reject, "reject", 0, "`P`: probability that it is rejected")
	fs.Float64Var(&e.Ignore, "ignore", 0, "`P`: probability that it is never answered")
	fs.Func("behaviour", "`NAME=WHAT`: commands by this name do WHAT, one of the above; may be repeated", func(s string) error {
		name, what, ok := strings.Cut(s, "=")
		if !ok || name == "" {
			return errors.New("not of the form NAME=WHAT, such as open-valve=slow")
		}
		b, err := firmwaresim.ParseBehaviour(what)
		if err != nil {
			return err
		}
		if e.Names == nil {
			e.Names = make(map[string]firmwaresim.Behaviour)
		}
		e.Names[name] = b
		return nil
	})
	fs.BoolVar(&o.sleep, "sleep", false, "devices are on-line for --awake in each --period, then disconnect and keep their session")
	fs.DurationVar(&o.sim.Awake, "awake", defaultAwake, "`D`: with --sleep, how long")
	fs.DurationVar(&o.sim.Period, "period", defaultPeriod, "`D`: with --sleep, how often")

	fs.Float64Var(&o.sim.Flaky, "flaky", 0, "`P`: probability, each second and device, that the link breaks: reset, closed, cut in\nthe middle of a packet, or gone without the broker noticing")
	fs.Float64Var(&o.sim.Crash, "crash", 0, "`P`: probability, each second and device, of a crash: RAM is lost, flash is kept")
	fs.IntVar(&o.sim.Buffer, "buffer", 0, "`N`: messages that fit into a device's flash; when full the oldest makes room\n(0: 1000, or one more than the window if that is larger)")
	fs.BoolVar(&o.sim.CleanSession, "clean", false, "sessions end with the connection: what was in flight is sent as new, not as DUP")
	fs.DurationVar(&o.sim.KeepAlive, "keep-alive", 0, "`D`: keep alive (0: 30s, negative: none)")
	fs.DurationVar(&o.sim.MaxBackoff, "max-backoff", 0, "`D`: longest pause before a reconnect (0: 30s)")
	fs.Float64Var(&o.sim.ConnectRate, "connect-rate", 0, "`R`: first connections a second of the whole fleet (0: 2000)")
	fs.Uint64Var(&o.sim.Seed, "seed", 1, "`N`: decides values and faults; the same gives the same")

	fs.DurationVar(&o.sim.Drain, "drain", 0, "`D`: when sampling is over, the longest wait until all is acknowledged\n(0: 10s, negative: not at all)")
	v := &o.verify
	fs.StringVar(&v.URL, "verify", "", "`URL`: subscribe upstream there and reconcile what arrives with what was acknowledged")
	fs.Func("verify-filter", "`FILTER`: subscribe there to it; may be repeated (none: gw/+/# and dt/#; passthrough with a\ntopic_prefix needs its own)", func(s string) error {
		if !mqtt.ValidFilter(s) {
			return errors.New("not a topic filter")
		}
		v.filters = append(v.filters, s)
		return nil
	})
	fs.StringVar(&v.Username, "verify-username", "", "`NAME`: user there")
	fs.StringVar(&v.PasswordFile, "verify-password-file", "", "`FILE`: its password")
	fs.StringVar(&v.TLS.CA, "verify-ca", "", "`FILE`: who signed that broker's certificate, PEM")
	fs.DurationVar(&v.wait, "verify-wait", defaultVerifyWait, "`D`: give up when something is missing and nothing has arrived for so long")
	fs.BoolVar(&o.json, "json", false, "print the result as JSON")
	fs.BoolVar(&o.quiet, "quiet", false, "no progress and no warnings on stderr")
	return fs
}

// parse reads the command line. What the fleet itself checks is not checked here.
func parse(args []string, stdout io.Writer) (o options, err error) {
	fs := flags(&o)
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		usage(stdout, fs)
		return o, errHelped
	case err != nil:
		return o, err
	case fs.NArg() > 0:
		return o, fmt.Errorf("argument %q: there are only flags, such as --broker %s", fs.Arg(0), fs.Arg(0))
	case o.sim.Broker == "":
		return o, errors.New("--broker is missing: which broker? For example --broker mqtt://127.0.0.1:1883")
	}
	return o, o.complete()
}

// complete turns flags into what the fleet takes, and reports all that is wrong.
func (o *options) complete() error {
	var errs []error
	switch o.version {
	case "4", "3.1.1":
		o.sim.Version = mqtt.V311
	case "5":
		o.sim.Version = mqtt.V5
	default:
		errs = append(errs, fmt.Errorf("--version %q: there are 4 (MQTT 3.1.1) and 5", o.version))
	}
	switch o.qos {
	case "profile":
		o.sim.QoS = firmwaresim.ByProfile
	case "0":
		o.sim.QoS = firmwaresim.QoS0
	case "1":
		o.sim.QoS = firmwaresim.QoS1
	case "2":
		o.sim.QoS = firmwaresim.QoS2
	default:
		errs = append(errs, fmt.Errorf("--qos %q: there are 0, 1, 2 and profile", o.qos))
	}
	if o.passwordFile != "" {
		b, err := os.ReadFile(o.passwordFile)
		if err != nil {
			errs = append(errs, fmt.Errorf("--password-file: %w", err))
		}
		o.sim.Password = strings.TrimRight(string(b), "\r\n")
	}
	if config, err := o.tls(); err != nil {
		errs = append(errs, err)
	} else {
		o.sim.TLS = config
	}
	if !o.sleep {
		if o.sim.Awake != defaultAwake || o.sim.Period != defaultPeriod {
			errs = append(errs, errors.New("--awake and --period are for devices that --sleep"))
		}
		o.sim.Awake = 0
	}
	if e := &o.sim.Execution; !o.sim.Commands && (e.Duration != 0 || e.Fail+e.Reject+e.Ignore != 0 || e.Names != nil) {
		errs = append(errs, errors.New("--execution, --fail, --reject, --ignore and --behaviour are for devices that take --commands"))
	}
	errs = append(errs, o.credentials())
	if o.sim.Devices < 1 {
		errs = append(errs, fmt.Errorf("--devices %d: at least one", o.sim.Devices))
	}
	if err := o.verify.check(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

const (
	defaultAwake  = 2 * time.Second
	defaultPeriod = time.Minute
)

// credentials has each device log in as itself, where that is asked for.
func (o *options) credentials() error {
	if o.certDir != "" {
		if o.cert+o.key != "" {
			return errors.New("--cert-dir gives each device its own certificate, --cert and --key give all the same: which?")
		}
		dir := o.certDir
		o.sim.CertificateOf = func(device string) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(filepath.Join(dir, device+".crt"), filepath.Join(dir, device+".key"))
			if err != nil {
				return nil, fmt.Errorf("--cert-dir: %w", err)
			}
			return &pair, nil
		}
	}
	if o.secrets == "" {
		return nil
	}
	if o.passwordFile != "" {
		return errors.New("--secrets gives each device its own password, --password-file gives all the same: which?")
	}
	secrets, err := readSecrets(o.secrets)
	if err != nil {
		return fmt.Errorf("--secrets: %w", err)
	}
	for i := range o.sim.Devices {
		if id := firmwaresim.DeviceID(o.sim.Prefix, o.sim.First+i); secrets[id] == "" {
			return fmt.Errorf("--secrets %s: no line for %s", o.secrets, id)
		}
	}
	o.sim.PasswordOf = func(device string) string { return secrets[device] }
	return nil
}

// readSecrets reads lines of id and secret; one that begins with id,secret is a heading.
func readSecrets(file string) (map[string]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := csv.NewReader(f)
	r.FieldsPerRecord = -1
	secrets := make(map[string]string)
	for {
		fields, err := r.Read()
		if errors.Is(err, io.EOF) {
			return secrets, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		line, _ := r.FieldPos(0)
		switch {
		case len(fields) < 2 || fields[0] == "" || fields[1] == "":
			return nil, fmt.Errorf("%s:%d: not of the form id,secret", file, line)
		case fields[0] == "id" && fields[1] == "secret":
			continue
		case secrets[fields[0]] != "":
			return nil, fmt.Errorf("%s:%d: device %s stands there twice", file, line, fields[0])
		}
		secrets[fields[0]] = fields[1]
	}
}

func (o *options) tls() (*tls.Config, error) {
	if o.ca+o.cert+o.key+o.certDir+o.serverName == "" {
		return nil, nil
	}
	if !strings.HasPrefix(o.sim.Broker, "mqtts:") {
		return nil, errors.New("--ca, --cert, --key, --cert-dir and --server-name are for mqtts:// brokers")
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: o.serverName}
	if o.ca != "" {
		pem, err := os.ReadFile(o.ca)
		if err != nil {
			return nil, fmt.Errorf("--ca: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--ca %s: no certificate in it", o.ca)
		}
	}
	if o.cert+o.key != "" {
		pair, err := tls.LoadX509KeyPair(o.cert, o.key)
		if err != nil {
			return nil, fmt.Errorf("--cert, --key: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// usage prints all flags in their groups.
func usage(w io.Writer, fs *flag.FlagSet) {
	fmt.Fprint(w, intro)
	for _, g := range groups {
		fmt.Fprintf(w, "\n%s:\n", g.title)
		for _, name := range g.flags {
			f := fs.Lookup(name)
			value, text := flag.UnquoteUsage(f)
			text = strings.TrimPrefix(text, value+": ") // each text begins with the name of its value
			if d := f.DefValue; d != "" && d != "0" && d != "false" && d != "0s" {
				text += " (" + d + ")"
			}
			head := "--" + name
			if value != "" {
				head += " " + value
			}
			fmt.Fprintf(w, "  %-28s %s\n", head, strings.ReplaceAll(text, "\n", "\n"+strings.Repeat(" ", 31)))
		}
	}
}
